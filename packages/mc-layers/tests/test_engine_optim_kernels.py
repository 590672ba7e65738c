"""Kernels that go once over the memory of all parameters; without a GPU in Triton's interpreter."""

import pytest
import torch
from torch.testing import assert_close
from triton_kernels import COMPILED, DEVICE, INTERPRETED, run_interpreted, runs_kernels, starts_interpreter

from model_center.engine import TorchEngine, tensors, use_engine
from model_center.engine.optim import AdamOptimizer, clip_grad_norm

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if COMPILED else []


@starts_interpreter
def test_interpreted() -> None:
    run_interpreted(__file__)


SIZES = [2048, 5001, 1, 4096, 700]


def tensors_of(sizes: list[int], dtype: torch.dtype, *, aligned: bool) -> list[torch.Tensor]:
    """Random vectors one behind the other, each at the beginning of 16 bytes or all one element off."""
    room = [-(-size // 16) * 16 for size in sizes]
    values = torch.randn(sum(room) + 1, device=DEVICE).to(dtype)[0 if aligned else 1 :]
    return [part[:size] for part, size in zip(values[: sum(room)].split(room), sizes, strict=True)]


@runs_kernels
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_follows_torchs_adamw(dtype: torch.dtype, aligned: bool) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter takes the bits of bfloat16 for integers")
    from model_center.engine.optim import kernels

    torch.manual_seed(0)
    masters = tensors_of(SIZES, torch.float32, aligned=aligned)
    references = [torch.nn.Parameter(master.clone()) for master in masters]
    options = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(references, **options)  # type: ignore[arg-type]
    parameters = tensors_of(SIZES, dtype, aligned=aligned)
    moments = [[torch.zeros_like(master) for master in masters] for _ in range(2)]
    steps = [torch.zeros((), device=DEVICE) for _ in SIZES]
    for number in range(4):
        gradients = [gradient * 64 for gradient in tensors_of(SIZES, dtype, aligned=True)]
        taking_part = [index for index in range(len(SIZES)) if index != number]  # steps differ between parameters
        for index, reference in enumerate(references):
            reference.grad = gradients[index].float() / 64 if index in taking_part else None
        optimizer.step()
        operands = [
            [column[index] for index in taking_part] for column in (parameters, gradients, masters, *moments, steps)
        ]
        kernels.update(*operands, scale=64, **options)  # type: ignore[arg-type]
    for index, reference in enumerate(references):
        state = optimizer.state[reference]
        assert_close(masters[index], reference.detach(), rtol=2e-6, atol=2e-7)
        assert torch.equal(parameters[index], masters[index].to(dtype))
        assert steps[index] == state["step"]
        assert_close(moments[0][index], state["exp_avg"], rtol=1e-5, atol=1e-7)
        assert_close(moments[1][index], state["exp_avg_sq"], rtol=1e-5, atol=1e-9)


@runs_kernels
@pytest.mark.parametrize("aligned", [True, False])
def test_multiplies_in_place(aligned: bool) -> None:
    from model_center.engine.optim import kernels

    gradients = tensors_of([*SIZES, 0], torch.float16, aligned=aligned)
    expected = [(gradient.float() * 0.37).half() for gradient in gradients]
    kernels.multiply(gradients, torch.tensor(0.37, device=DEVICE))
    kernels.multiply(gradients[-1:], torch.tensor(0.37, device=DEVICE))
    for gradient, product in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, product)


@pytest.mark.skipif(not COMPILED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_and_without_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training by the kernels and by PyTorch's multi-tensor operations."""
    results = []
    for there in (True, False):
        monkeypatch.setattr(tensors, "runs_triton", lambda _, there=there: there)
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
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
