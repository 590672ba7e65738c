"""The position-wise feed-forward layer, plain and gated."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.layer.activations import ACTIVATIONS
from model_center.layer.checks import check_choice, check_last_dim, check_positive, check_probability
from model_center.layer.linear import Linear
from model_center.layer.module import Module
from model_center.layer.options import DropoutOptions, PrecisionOptions, ScaleOptions, select

GATED = "gated_"
"""In front of an activation's name: multiply the activated projection with a second, linear one (Shazeer 2020)."""


def _activation(name: str) -> torch.nn.Module:
    check_choice("activate_fn", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


@dataclass(eq=False, repr=False)
class DenseACT(ScaleOptions, PrecisionOptions, Module):
    """A linear layer and an activation: `act(w(x))`."""

    dim_in: int
    dim_ff: int
    activate_fn: str
    _: KW_ONLY
    init_mean: float = 0.0
    init_std: float = 0.02
    bias: bool = False

    def __post_init__(self) -> None:
        self.w = Linear(**select(Linear, self, dim_out=self.dim_ff))
        self.act = _activation(self.activate_fn)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, dim_in) to (…, dim_ff)."""
        activated: Tensor = self.act(self.w(x))
        return activated


@dataclass(eq=False, repr=False)
class DenseGatedACT(DenseACT):
    """Two linear layers, one activated and one not, multiplied: `act(w_0(x)) * w_1(x)`."""

    def __post_init__(self) -> None:
        self.w_0 = Linear(**select(Linear, self, dim_out=self.dim_ff))
        self.w_1 = Linear(**select(Linear, self, dim_out=self.dim_ff))
        self.act = _activation(self.activate_fn)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, dim_in) to (…, dim_ff)."""
        gated: Tensor = self.act(self.w_0(x)) * self.w_1(x)
        return gated


@dataclass(eq=False, repr=False)
class FeedForward(DropoutOptions, ScaleOptions, PrecisionOptions, Module):
    """Project to `dim_ff`, activate, drop, project back.

    `dropout_p` concerns the activated middle, as in T5; what happens to the output is the enclosing block's matter.

    Args:
        dim_in: Size of the input's last dimension.
        dim_ff: Size of the middle.
        dim_out: Size of the output's last dimension; None means `dim_in`.
        init_mean: Mean of the normal distribution that weights start from.
        init_std: Its standard deviation.
        bias: Whether both projections have a bias.
        activate_fn: A name from `ACTIVATIONS`, with `gated_` in front for the gated form.
        dropout_p: Probability of dropping an element of the middle in training.
        dtype: Type of the parameters.
        int8: *Added.* Store weights in 8 bits, for inference.
        length_scale: *Added.* Divide products by the square root of their input dimension.
    """

    dim_in: int
    dim_ff: int
    dim_out: int | None = None
    _: KW_ONLY
    init_mean: float = 0.0
    init_std: float = 0.02
    bias: bool = False
    activate_fn: str = "gated_gelu"

    def __post_init__(self) -> None:
        check_positive(dim_in=self.dim_in, dim_ff=self.dim_ff)
        check_probability(dropout_p=self.dropout_p)
        check_choice("activate_fn", self.activate_fn, [*ACTIVATIONS, *(GATED + name for name in ACTIVATIONS)])
        dense = DenseGatedACT if self.activate_fn.startswith(GATED) else DenseACT
        self.w_in = dense(**select(dense, self, activate_fn=self.activate_fn.removeprefix(GATED)))
        dim_out = self.dim_in if self.dim_out is None else self.dim_out
        self.w_out = Linear(**select(Linear, self, dim_in=self.dim_ff, dim_out=dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, seq_len, dim_in) to (batch, seq_len, dim_out)."""
        check_last_dim("x", x, "dim_in", self.dim_in)
        middle = self.w_in(x)
        if self.training and self.dropout_p:
            middle = F.dropout(middle, self.dropout_p)
        output: Tensor = self.w_out(middle)
        return output
