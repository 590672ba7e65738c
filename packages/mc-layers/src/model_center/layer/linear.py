"""The fully connected layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.engine import HALF, Constant
from model_center.layer.checks import check_last_dim, check_positive
from model_center.layer.weight_matrix import WeightMatrix


class Linear(WeightMatrix):
    """A fully connected layer, `y = W x + b`.

    Args:
        dim_in: Size of the input's last dimension.
        dim_out: Size of the output's last dimension.
        dtype: Type of the parameters.
        init_mean: Mean of the normal distribution that `weight`, of shape (dim_out, dim_in), starts from.
        init_std: Its standard deviation.
        bias: Whether to add a bias, which starts at zero.
        length_scale: *Added.* Divide `W x` by the square root of `dim_in`.
        int8: *Added.* Store `weight` in 8 bits with one scale per output (see `WeightMatrix`).
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dtype: torch.dtype = HALF,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        bias: bool = False,
        *,
        length_scale: bool = False,
        int8: bool = False,
    ) -> None:
        check_positive(dim_in=dim_in, dim_out=dim_out)
        self.dim_in = dim_in
        self.dim_out = dim_out
        self.length_scale = length_scale
        self.make_weight(dim_out, dim_in, dtype=dtype, int8=int8, mean=init_mean, std=init_std)
        self.bias = self.parameter(dim_out, dtype=dtype, init=Constant(0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, seq_len, dim_in), or any (…, dim_in), to (…, dim_out)."""
        check_last_dim("x", x, "dim_in", self.dim_in)
        weight, bias = self.float_weight(), self.bias
        if not self.length_scale:
            return F.linear(x, weight, bias)
        product = F.linear(x, weight) / math.sqrt(self.dim_in)
        return product if bias is None else product + bias
