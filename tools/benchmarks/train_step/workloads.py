"""What is measured: models and sizes of training steps, and the ways to run them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from model_center.model import Config, families

MASKED = 0.15
"""Share of the real tokens that a masked language model has to predict (Devlin et al. 2018)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and what one process trains on in a step.

    Attributes:
        family: the model's family.
        preset: the published size it has; None for the family's defaults.
        options: further options of its configuration.
        batch: rows of a step.
        length: positions of a row, of the encoder in an encoder-decoder.
        target_length: positions of the decoder in an encoder-decoder.
        padding: share of the positions that is padding on average: each row's length is drawn.
        settings: names of the ways of `SETTINGS` that are compared by default.
        target: what has to be reached, for the table.
    """

    family: str
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int
    length: int
    target_length: int = 0
    padding: float = 0.0
    settings: tuple[str, ...] = ("ours",)
    target: str = ""

    def config(self, dtype: torch.dtype) -> Config:
        """The configuration, without dropout, starting from small weights."""
        config_class = families[self.family].config_class
        size = {} if self.preset is None else config_class.published[self.preset].size
        start = {} if size.get("length_scale") else dict.fromkeys(_SPREADS, 0.02)
        given = {**start, "dropout_p": 0.0, "att_dropout_p": 0.0, **size, **self.options, "dtype": dtype}
        return config_class(**given)


_SPREADS = ("emb_init_std", "pos_init_std", "proj_init_std", "att_init_std", "ffn_init_std")
_COMPARED = ("ours", "ours-compiled", "ours-recomputed", "ours-bmtrain", "transformers", "transformers-compiled")
_BERT = Workload(
    family="bert",
    preset="bert-large-uncased",
    options={"tied": True},
    batch=64,
    length=512,
    settings=_COMPARED,
    target="at least 500 samples/s in 25 GiB; lean at least 320 in 8 GiB",
)
_T5 = Workload(
    family="t5",
    preset="t5-3b",
    options={"tied": True},
    batch=16,
    length=512,
    target_length=512,
    settings=("ours", "ours-compiled", "ours-recomputed", "transformers", "transformers-recomputed"),
    target="at least 45 samples/s in 60 GiB",
)
WORKLOADS = {
    "bert-large": _BERT,
    "bert-large-padded": replace(_BERT, padding=0.5, target="at least 1.8 times Transformers' samples/s"),
    "gpt2-xl": Workload(
        family="gpt2",
        preset="gpt2-xl",
        batch=16,
        length=1024,
        settings=("ours", "ours-compiled", "ours-recomputed", "transformers-compiled"),
        target="at least 55,000 tokens/s in 60 GiB",
    ),
    "t5-3b": _T5,
    "cpm1": Workload(
        family="cpm1",
        preset="cpm1-large",
        batch=32,
        length=512,
        settings=("ours", "ours-compiled", "ours-recomputed"),
        target="at least 60 samples/s",
    ),
    "t5-11b": replace(
        _T5,
        preset="t5-11b",
        batch=32,
        settings=("ours-offloaded",),
        target="2 processes, cap of 39.4 GiB: at least 10 samples/s",
    ),
    "gpt-13b": Workload(
        family="gpt2",
        options={"dim_model": 5120, "num_heads": 40, "dim_head": 128, "dim_ff": 20480, "num_layers": 40},
        batch=32,
        length=512,
        settings=("ours-recomputed", "ours-bmtrain", "transformers-recomputed"),
        target="4 processes: at least 48 samples/s",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to run a workload.

    Attributes:
        side: our models, or those of Transformers.
        engine: of ours; Transformers in several processes runs FSDP2.
        attention: of Transformers.
        compiled: whether our engine compiles blocks, or Transformers' whole model is compiled.
        activation_budget: share of the activations that our engine's compiled blocks keep.
        recomputed: whether blocks recompute their activations in backward.
        deterministic: whether our engine repeats runs bit by bit.
        keeps_padding: whether our blocks run over padding, too, which they otherwise leave out on GPUs.
        offloaded: whether the optimizer's state is kept and updated by the host (ours).
        dtype: of our weights, beside float32 masters; with Transformers, that of autocast over float32 weights.
    """

    side: Literal["ours", "transformers"] = "ours"
    engine: Literal["torch", "bmtrain"] = "torch"
    attention: Literal["sdpa", "eager"] = "sdpa"
    compiled: bool = False
    activation_budget: float | None = None
    recomputed: bool = False
    deterministic: bool = False
    keeps_padding: bool = False
    offloaded: bool = False
    dtype: str = "bfloat16"


_THEIRS = Setting(side="transformers")
SETTINGS = {
    "ours": Setting(),
    "ours-fp32": Setting(dtype="float32"),
    "ours-compiled": Setting(compiled=True),
    "ours-compiled-lean": Setting(compiled=True, activation_budget=0.5),
    "ours-compiled-recomputed": Setting(compiled=True, recomputed=True),
    "ours-compiled-bmtrain": Setting(compiled=True, engine="bmtrain"),
    "ours-compiled-bmtrain-recomputed": Setting(compiled=True, engine="bmtrain", recomputed=True),
    "ours-deterministic": Setting(deterministic=True),
    "ours-padded": Setting(keeps_padding=True),
    "ours-recomputed": Setting(recomputed=True),
    "ours-offloaded": Setting(recomputed=True, offloaded=True),
    "ours-bmtrain": Setting(engine="bmtrain"),
    "ours-bmtrain-recomputed": Setting(engine="bmtrain", recomputed=True),
    "transformers": _THEIRS,
    "transformers-eager": replace(_THEIRS, attention="eager"),
    "transformers-compiled": replace(_THEIRS, compiled=True),
    "transformers-recomputed": replace(_THEIRS, recomputed=True),
    "transformers-fp32": replace(_THEIRS, dtype="float32"),
}


def settings_of(names: Iterable[str], budgets: Sequence[float]) -> dict[str, Setting]:
    """Settings by name; with `budgets`, one for each of these takes the place of a setting that has a budget.

    Raises:
        ValueError: There are budgets, but none of the settings has one.
    """
    names, found = list(names), {}
    if budgets and all(SETTINGS[name].activation_budget is None for name in names):
        raise ValueError(f"--activation_budget needs a setting that has one, such as ours-compiled-lean, not {names}")
    for name in names:
        setting = SETTINGS[name]
        if setting.activation_budget is None or not budgets:
            found[name] = setting
        else:
            found |= {f"{name} {budget:g}": replace(setting, activation_budget=budget) for budget in budgets}
    return found
