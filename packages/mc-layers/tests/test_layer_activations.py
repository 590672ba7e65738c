"""GELU of compiled half-precision blocks, at every value that a half-precision number can have."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model_center.layer import ACTIVATIONS

F64 = torch.float64
HALF_TYPES = [torch.bfloat16, torch.float16]
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
BACKENDS = ["eager", pytest.param("inductor", marks=NEEDS_GPU)]


def every_value(dtype: torch.dtype) -> Tensor:
    """Those below a million, behind which the derivatives of PyTorch's formulas are not numbers either."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return values[values.double().abs() < 1e6]


def expected(name: str, x: Tensor) -> Tensor:
    if name == "gelu":
        share: Tensor = 0.5 * torch.special.erfc(-x / math.sqrt(2))
    else:  # (1 + tanh(u)) / 2, without cancellation
        share = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x * share


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("name", ["gelu", "gelu_new"])
def test_compiled_gelu_is_rounded_once(name: str, dtype: torch.dtype, backend: str) -> None:
    device = "cpu" if backend == "eager" else "cuda"
    x = every_value(dtype).to(device)
    upstream = torch.linspace(-2, 2, len(x), device=device).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(ACTIVATIONS[name](), backend=backend, fullgraph=True)
    found = with_gradient(compiled, x, upstream)
    exact = with_gradient(lambda x: expected(name, x), x.double(), upstream.double())
    for one, two in zip(found, exact, strict=True):
        assert one.dtype == dtype
        # Half a unit of the last place, and a float32 result of about 1 before it.
        torch.testing.assert_close(one.double(), two, rtol=0.505 * torch.finfo(dtype).eps, atol=5e-7)


@pytest.mark.parametrize("name", ["gelu", "gelu_new"])
def test_other_types_are_pytorchs(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ACTIVATIONS[name](), backend="eager", fullgraph=True)
    approximate = "none" if name == "gelu" else "tanh"
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-9, 9, 1001, dtype=dtype)
        assert torch.equal(compiled(x), torch.nn.functional.gelu(x, approximate=approximate))


def test_uncompiled_gelu_is_pytorchs() -> None:
    x = every_value(torch.bfloat16)
    assert torch.equal(ACTIVATIONS["gelu"]()(x), torch.nn.functional.gelu(x))
