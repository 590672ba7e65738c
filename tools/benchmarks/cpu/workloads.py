"""The small models that a CPU trains and runs, one of each shape."""

from dataclasses import replace

from ..train_step.workloads import SETTINGS, Workload

_SMALL = {"num_layers": 4, "dim_model": 512, "num_heads": 8, "dim_ff": 2048, "tied": True}
WORKLOADS = {
    "bert": Workload(family="bert", preset="bert-base-uncased", options=_SMALL, batch=8, length=64),
    "gpt2": Workload(family="gpt2", preset="gpt2-base", options=_SMALL, batch=4, length=64),
    "t5": Workload(family="t5", preset="t5-small", options={"tied": True}, batch=4, length=64, target_length=32),
}
_THEIRS = SETTINGS["transformers-fp32"]
SIDES = {
    "ours": SETTINGS["ours-fp32"],
    "Transformers": _THEIRS,
    "Transformers, eager": replace(_THEIRS, attention="eager"),
}
COMPILED = {"Transformers, compiled": replace(_THEIRS, compiled=True)}
