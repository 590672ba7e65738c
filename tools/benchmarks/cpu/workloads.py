"""The small models that a CPU trains and runs, one of each shape."""

from dataclasses import replace

from ..train_step.workloads import SETTINGS, Setting, Workload

_SMALL = {"num_layers": 4, "dim_model": 512, "num_heads": 8, "dim_ff": 2048, "tied": True}
WORKLOADS = {
    "bert": Workload(family="bert", preset="bert-base-uncased", options=_SMALL, batch=8, length=64),
    "gpt2": Workload(family="gpt2", preset="gpt2-base", options=_SMALL, batch=4, length=64),
    "gptj": Workload(
        family="gptj", options={**_SMALL, "dim_head": 64, "pos_rotary_dim": 32, "tied": False}, batch=4, length=64
    ),
    "t5": Workload(family="t5", preset="t5-small", options={"tied": True}, batch=4, length=64, target_length=32),
}
_THEIRS = SETTINGS["transformers-fp32"]


def settings(family: str, compiled: bool) -> dict[str, Setting]:
    """The sides that are compared; Transformers' GPT-J has its eager attention only."""
    eager = replace(_THEIRS, attention="eager")
    sides = {"ours": SETTINGS["ours-fp32"], "Transformers": eager if family == "gptj" else _THEIRS}
    if family != "gptj":
        sides["Transformers, eager"] = eager
    if compiled:
        sides["Transformers, compiled"] = replace(sides["Transformers"], compiled=True)
    return sides
