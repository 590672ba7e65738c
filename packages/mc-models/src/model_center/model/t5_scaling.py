"""The two scalings of T5: of the decoder's output, and of the residual stream.

T5's first version divides the decoder's output by the square root of its width before the projection.

The residual stream of the published weights overflows in fp16, so it can be divided by a constant: embeddings and the
outputs of attention and feed-forward layers are. Root-mean-square norms undo that (their epsilon is divided by the
square), so the model computes the same. Relu, and the linear branch of a gate, let both matrices of the feed-forward
layer share the division, which keeps its middle small as well.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from model_center.engine import current_engine
from model_center.model.base import Stored
from model_center.model.output_projection import OutputProjection
from model_center.model.rules import Rule, scaled
from model_center.model.seq2seq import Seq2Seq, Seq2SeqConfig

AUTOMATIC = 100.0
"""The divisor that is chosen for fp16."""


@dataclass(kw_only=True)
class T5ScalingConfig(Seq2SeqConfig):
    """The options of the scalings."""

    not_exported: ClassVar = Seq2SeqConfig.not_exported | {"residual_scale"}

    scale_decoder_outputs: bool | None = None
    """Whether the decoder's output is divided by the square root of its width; None means that tied models do it."""
    residual_scale: float | None = None
    """What the residual stream is divided by; None keeps a checkpoint's, or chooses 100 where fp16 needs it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tied


class T5Scaling(Seq2Seq):
    """An encoder-decoder with these scalings."""

    config: T5ScalingConfig

    @property
    def stack_norm_eps(self) -> float:
        """The epsilon of the norms of the divided stream."""
        return self.config.norm_eps / (self.config.residual_scale or 1.0) ** 2

    def output_projection_of(self, hidden_states: Tensor) -> OutputProjection:
        """Of scaled hidden states; the embedding that a tied model projects with has been divided, too."""
        if self.config.scale_decoder_outputs:
            hidden_states = hidden_states * self.config.dim_model**-0.5
        if self.config.tied and self.config.cls_head is None:
            hidden_states = hidden_states * (self.config.residual_scale or 1.0)
        return super().output_projection_of(hidden_states)

    @classmethod
    def fit(cls, config: Any, stored: Stored) -> Any:
        """Chooses the scale where the configuration leaves it open.

        Raises:
            ValueError: plain weights that were not trained in fp16 are to be used in it, undivided.
        """
        config = super().fit(config, stored)
        scale = config.residual_scale or stored.options.get("residual_scale")
        if current_engine().resolve_dtype(config.dtype) is torch.float16 and scale in (None, 1) and _overflows(stored):
            if scale is not None:
                raise ValueError(
                    f"`residual_scale` must not be 1 for {stored.weights.path} in float16, where the model overflows; "
                    f"use {AUTOMATIC:g}, or dtype=torch.bfloat16"
                )
            scale = AUTOMATIC
        return replace(config, residual_scale=scale)

    @classmethod
    def own_rules(cls, names: list[str], config: Any, stored: Stored) -> list[Rule]:
        """Our own names, divided by what the stored weights are not divided by yet."""
        rules = super().own_rules(names, config, stored)
        change = (config.residual_scale or 1.0) / (stored.options.get("residual_scale") or 1.0)
        return rules if change == 1 else scaled(rules, divisions(config, change))


def divisions(config: Seq2SeqConfig, scale: float) -> dict[str, float]:
    """Ending of our name -> factor, for a residual stream divided by `scale`."""
    gated = config.ffn_activate_fn.startswith("gated_")
    middle = scale**-0.5 if gated or config.ffn_activate_fn == "relu" else 1.0
    return {
        "input_embedding.weight": 1 / scale,
        ".attention_out.weight": 1 / scale,
        ".attention_out.bias": 1 / scale,
        ".w_in.w.weight": middle,
        ".w_in.w.bias": middle,
        ".w_in.w_1.weight": middle,
        ".w_in.w_1.bias": middle,
        ".w_out.weight": 1 / scale / middle,
        ".w_out.bias": 1 / scale,
    }


def _overflows(stored: Stored) -> bool:
    """Whether the weights were not made for fp16: published ones never are, own ones unless they are stored in it."""
    if stored.is_foreign:
        return True
    return any(stored.weights.read(name).dtype is not torch.float16 for name in stored.weights.names())
