"""Layer normalisation and its root-mean-square form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.engine import HALF, Constant
from model_center.layer.checks import check_last_dim, check_positive
from model_center.layer.module import Module


class LayerNorm(Module):
    """Normalise the last dimension; statistics are computed in float32 at least, and the result is cast back.

    With `bias`: `(x - E[x]) / sqrt(Var[x] + eps) * weight + bias` (Ba et al. 2016), with the population variance.
    Without: `x / sqrt(E[x²] + eps) * weight` (root mean square, Zhang and Sennrich 2019), as in T5 and CPM.
    (ModelCenter 0.1's documentation prints the first form without the square root; its models have it.)

    Args:
        dim_norm: Size of the last dimension.
        dtype: Type of the parameters.
        bias: Choose the form with mean and bias.
        eps: Added to the variance.
        init_var: Initial value of the weight.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        dim_norm: int,
        dtype: torch.dtype = HALF,
        bias: bool = True,
        eps: float = 1e-5,
        init_var: float = 1.0,
    ) -> None:
        check_positive(dim_norm=dim_norm)
        self.dim_norm = dim_norm
        self.eps = eps
        self.weight = self.parameter(dim_norm, dtype=dtype, init=Constant(init_var))
        self.bias = self.parameter(dim_norm, dtype=dtype, init=Constant(0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, shape (…, dim_norm), into the same shape."""
        check_last_dim("x", x, "dim_norm", self.dim_norm)
        bias = self.bias  # an engine may gather a parameter each time it is read
        if bias is None:
            return F.rms_norm(x, (self.dim_norm,), self.weight, self.eps)
        return F.layer_norm(x, (self.dim_norm,), self.weight, bias, self.eps)
