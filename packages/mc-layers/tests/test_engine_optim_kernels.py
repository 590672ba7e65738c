"""Kernels that go once over the memory of all parameters; without a GPU in Triton's interpreter."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from triton_kernels import (
    COMPILED,
    DEVICE,
    compile_instead_of_running,
    run_interpreted,
    runs_kernels,
    starts_interpreter,
)

from model_center.engine import TorchEngine, tensors, use_engine
from model_center.engine.optim import AdamOptimizer, clip_grad_norm
from model_center.engine.optim.masters import joined

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if COMPILED else []


@starts_interpreter
def test_interpreted() -> None:
    run_interpreted(__file__)


@pytest.fixture
def kernels_take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are chosen in the interpreter as they are on a GPU."""
    monkeypatch.setattr(tensors, "_is_on_gpu", lambda _: True)
    monkeypatch.setattr(tensors, "runs_triton", lambda _: True)


SIZES = [2048, 5001, 0, 1, 4096, 700]


def tensors_of(sizes: list[int], dtype: torch.dtype, *, aligned: bool) -> list[torch.Tensor]:
    """Random vectors one behind the other, each at the beginning of 16 bytes or all one element off."""
    room = [-(-size // 16) * 16 for size in sizes]
    values = torch.randn(sum(room) + 1, device=DEVICE).to(dtype)[0 if aligned else 1 :]
    return [part[:size] for part, size in zip(values[: sum(room)].split(room), sizes, strict=True)]


@starts_interpreter
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_they_compile(dtype: torch.dtype, aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from model_center.engine.optim import kernels

    names = compile_instead_of_running(monkeypatch)
    values, gradients = (tensors_of([2048], dtype, aligned=aligned) for _ in range(2))
    masters = [torch.zeros(2048, dtype=torch.int16 if dtype is torch.bfloat16 else torch.float32)]
    moments, steps = [[torch.zeros(2048)], [torch.zeros(2048)]], [torch.zeros(())]
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "scale": 1.0}
    kernels.update(values, gradients, masters, moments[0], moments[1], steps, **options)
    kernels.multiply(gradients, torch.tensor(0.5))
    for largest in (True, False):
        kernels.norms(gradients, largest=largest)
    assert names == ["_count_kernel", "_update_kernel", "_scale_kernel", "_norm_kernel", "_norm_kernel"]


@runs_kernels
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.0, 0.9999)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_follows_torchs_adamw(dtype: torch.dtype, betas: tuple[float, float], aligned: bool) -> None:
    from model_center.engine.optim import kernels

    torch.manual_seed(0)
    parameters = tensors_of(SIZES, dtype, aligned=aligned)
    references = [torch.nn.Parameter(parameter.float()) for parameter in parameters]
    in_halves = dtype is torch.bfloat16
    masters = [torch.zeros_like(each, dtype=torch.int16) if in_halves else each.float() for each in parameters]
    options = {"lr": 3e-3, "betas": betas, "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(references, **options)  # type: ignore[arg-type]
    moments = [[torch.zeros_like(reference) for reference in references] for _ in range(2)]
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
        master = joined(parameters[index], masters[index]) if in_halves else masters[index]
        assert_close(master, reference.detach(), rtol=2e-6, atol=2e-7)
        assert torch.equal(parameters[index], master.to(dtype))
        assert steps[index] == state["step"]
        assert_close(moments[0][index], state["exp_avg"], rtol=1e-5, atol=1e-7)
        assert_close(moments[1][index], state["exp_avg_sq"], rtol=1e-5, atol=1e-9)


@runs_kernels
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multiplies_in_place(dtype: torch.dtype, aligned: bool) -> None:
    from model_center.engine.optim import kernels

    gradients = tensors_of([*SIZES, 0], dtype, aligned=aligned)
    expected = [(gradient.float() * 0.37).to(dtype) for gradient in gradients]
    kernels.multiply(gradients, torch.tensor(0.37, device=DEVICE))
    kernels.multiply(gradients[-1:], torch.tensor(0.37, device=DEVICE))
    for gradient, product in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, product)


@runs_kernels
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("norm_type", [2, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms(dtype: torch.dtype, norm_type: float, aligned: bool, kernels_take_all: None) -> None:
    torch.manual_seed(0)
    gradients = [64 * gradient for gradient in tensors_of(SIZES, dtype, aligned=aligned)]
    whole = torch.cat(gradients).double()
    norm = tensors.local_norm(gradients, norm_type, DEVICE)
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(whole, norm_type).item(), rel=1e-6)
    gradients[1][4000], gradients[4][7] = math.inf, -math.inf
    assert tensors.local_norm(gradients, norm_type, DEVICE).item() == math.inf
    gradients[1][70] = -math.nan
    assert tensors.local_norm(gradients, norm_type, DEVICE).isnan()


def reload_shards(optimizer: AdamOptimizer) -> None:
    shards = {(shard.index, shard.name): shard.read().clone() for shard in optimizer.shards()}
    optimizer.load_shards(optimizer.options(), lambda index, name, _: shards[index, name])


SHAPES = [(80, 100), (33,), (70, 64)]
LEARNING_RATE = 1e-2


def train_with_changes(dtype: torch.dtype) -> list[torch.Tensor]:
    """Masters and parameters after steps between which all may change that an optimizer could have remembered."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in SHAPES]
    parameters[2].grad_dtype = None  # any
    optimizer = AdamOptimizer(parameters, lr=LEARNING_RATE, weight_decay=0.01, hold_steps=1)
    for change in ("none", "one without gradient", "strides", "type", "state", "shards", "place", "none"):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, device=DEVICE).to(dtype)
        if change == "one without gradient":
            parameters[1].grad = None
        elif change == "strides":
            parameters[0].grad = torch.randn((100, 80), device=DEVICE).to(dtype).t()
        elif change == "type":
            parameters[2].grad = torch.randn((70, 64), device=DEVICE)
        elif change == "state":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif change == "shards":
            reload_shards(optimizer)
        elif change == "place":
            for parameter in parameters:
                old, parameter.data = parameter.data, parameter.data.clone()
                old.zero_()
        clip_grad_norm(optimizer.param_groups, max_norm=10.0, scale=2.0)
        optimizer.step(scale=2.0)
    assert [state["step"].item() for state in optimizer.state.values()] == [8, 7, 8]
    masters = [state["master"] for state in optimizer.state_dict()["state"].values()]
    return masters + [parameter.detach() for parameter in parameters]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_and_without_the_kernels(
    dtype: torch.dtype, kernels_take_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training by the kernels, which are to remember nothing, and by PyTorch's multi-tensor operations."""
    from model_center.engine.optim import kernels

    update, sizes = kernels.update, []

    def counted(*rows: list[torch.Tensor], **options: float) -> None:
        sizes.append(len(rows[0]))
        update(*rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "update", counted)
    results = []
    for _ in range(2):
        with use_engine(TorchEngine(DEVICE)):
            results.append(train_with_changes(dtype))
        monkeypatch.setattr(tensors, "runs_triton", lambda _: False)
    assert sizes == [3, 2, 2, 2, 3, 3, 3, 3]
    for ours, theirs in zip(*results, strict=True):
        # Norms that differ in the last digit round some of the clipped gradients, and so some steps, to either side.
        rounded = LEARNING_RATE * torch.finfo(dtype).eps
        assert_close(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=4 * rounded)
