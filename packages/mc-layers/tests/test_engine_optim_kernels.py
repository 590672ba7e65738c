"""Kernels that go once over a large parameter's memory; without a GPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from model_center.engine import TorchEngine, tensors, use_engine
from model_center.engine.optim import AdamOptimizer, clip_grad_norm

pytest.importorskip("triton")
COMPILED = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if COMPILED else "cpu")
pytestmark = [pytest.mark.gpu] if COMPILED else []
runs_kernels = pytest.mark.skipif(not (COMPILED or INTERPRETED), reason="runs in test_interpreted's process")


@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)), "--no-header"]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@runs_kernels
@pytest.mark.parametrize(("elements", "dtype"), [(2048, torch.float16), (5001, torch.float16), (4100, torch.bfloat16)])
def test_follows_torchs_adamw(elements: int, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter takes the bits of bfloat16 for integers")
    from model_center.engine.optim import kernels

    torch.manual_seed(0)
    master = torch.randn(elements, device=DEVICE)
    reference = torch.nn.Parameter(master.clone())
    options = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([reference], **options)  # type: ignore[arg-type]
    parameter, moments = master.to(dtype), [torch.zeros_like(master), torch.zeros_like(master)]
    step = torch.zeros((), device=DEVICE)
    for _ in range(4):
        gradient = (torch.randn(elements, device=DEVICE) * 64).to(dtype)
        reference.grad = gradient.float() / 64
        optimizer.step()
        first, second = moments
        kernels.update([parameter], [gradient], [master], [first], [second], [step], scale=64, **options)  # type: ignore[arg-type]
        assert_close(master, reference.detach(), rtol=2e-6, atol=2e-7)
        assert torch.equal(parameter, master.to(dtype))
    assert step == 4
    assert_close(moments[0], optimizer.state[reference]["exp_avg"], rtol=1e-5, atol=1e-7)
    assert_close(moments[1], optimizer.state[reference]["exp_avg_sq"], rtol=1e-5, atol=1e-9)


@runs_kernels
def test_multiplies_in_place() -> None:
    from model_center.engine.optim import kernels

    gradients = [torch.randn(elements, device=DEVICE).half() for elements in (2048, 5001)]
    expected = [(gradient.float() * 0.37).half() for gradient in gradients]
    kernels.multiply(gradients, torch.tensor(0.37, device=DEVICE))
    for gradient, product in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, product)


@pytest.mark.skipif(not COMPILED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_parameters_are_updated_as_small_ones_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training, in which the kernel takes the large parameter, and in which it takes none."""
    results = []
    for threshold in (2**12, 2**30):
        monkeypatch.setattr(tensors, "ONE_PASS_ELEMENTS", threshold)
        with use_engine(TorchEngine(DEVICE)):
            torch.manual_seed(0)
            shapes = [(80, 100), (33,), (70, 64)]
            parameters = [torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]
            optimizer = AdamOptimizer(parameters, lr=1e-2, weight_decay=0.01, hold_steps=1)
            for _ in range(5):
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                clip_grad_norm(optimizer.param_groups, max_norm=10.0, scale=2.0)
                optimizer.step(scale=2.0)
            results.append([optimizer.state[parameter]["master"] for parameter in parameters])
    for large, small in zip(*results, strict=True):
        assert_close(large, small, rtol=2e-6, atol=1e-6)
    assert torch.equal(results[0][1], results[1][1])
