"""Activations of the feed-forward layer.

PyTorch's compiler makes an exact error function and a tanh of GELU, whose instructions, in half precision, take longer
than reading and writing. Compiled blocks compute half-precision GELU by formulas of one exponential function, to
float32's rounding; everything else is PyTorch's.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor

# Abramowitz and Stegun 1964, 7.1.26: erfc(z) is exp(-z²) times this polynomial of 1 / (1 + rate·z), to 1.5e-7.
_ERFC_RATE = 0.3275911
_ERFC_COEFFICIENTS = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


class _ExactGELU(torch.autograd.Function):
    """x·Φ(x), Φ being the normal distribution function (Hendrycks and Gimpel 2016)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        share, _ = _normal_distribution(x.float())
        return (x.float() * share).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        x: Tensor = saved.float()
        share, density = _normal_distribution(x)
        return (gradient.float() * (share + x * density)).to(gradient.dtype)


def _normal_distribution(x: Tensor) -> tuple[Tensor, Tensor]:
    """Φ(x) and its derivative."""
    exponential = torch.exp(-0.5 * x * x)
    t = 1 / (1 + _ERFC_RATE / sqrt(2) * x.abs())
    polynomial = torch.zeros_like(x)
    for coefficient in reversed(_ERFC_COEFFICIENTS):
        polynomial = (polynomial + coefficient) * t
    tail = 0.5 * polynomial * exponential
    return torch.where(x < 0, tail, 1 - tail), exponential / sqrt(2 * pi)


class _TanhGELU(torch.autograd.Function):
    """GELU's approximation by tanh, 0.5·x·(1 + tanh(u)), which is x·sigmoid(2u)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x.float() * _sigmoid_of_cubic(x.float())).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        x: Tensor = saved.float()
        share = _sigmoid_of_cubic(x)
        slope = 2 * sqrt(2 / pi) * (1 + 3 * 0.044715 * x * x)
        return (gradient.float() * (share + x * share * (1 - share) * slope)).to(gradient.dtype)


def _sigmoid_of_cubic(x: Tensor) -> Tensor:
    return torch.sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x * x * x))


class GELU(torch.nn.GELU):
    """PyTorch's GELU, cheaper where a half-precision block is compiled."""

    def forward(self, input: Tensor) -> Tensor:
        """Map an input of any shape elementwise."""
        if not (torch.compiler.is_compiling() and input.dtype in (torch.float16, torch.bfloat16)):
            return super().forward(input)
        function = _TanhGELU if self.approximate == "tanh" else _ExactGELU
        output: Tensor = function.apply(input)  # type: ignore[no-untyped-call]
        return output


ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "relu": torch.nn.ReLU,
    "gelu": GELU,
    "gelu_new": lambda: GELU(approximate="tanh"),
    "gelu_tanh": lambda: GELU(approximate="tanh"),
    "silu": torch.nn.SiLU,
}
"""Activations by name. `gelu` is the exact form with the error function, `gelu_new` its tanh approximation."""
