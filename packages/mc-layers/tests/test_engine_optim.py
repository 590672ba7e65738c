"""Updates against torch.optim.AdamW and a naive float64 reference; what parameters and options may be."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import HALVES, OPTIMIZERS, OPTIONS, give_gradients, masters_of, parameters
from torch.utils._python_dispatch import TorchDispatchMode

from model_center import engine as bmt
from model_center.engine import tensors
from model_center.engine.optim import AdamOptimizer
from model_center.engine.optim import adam as adam_module

pytestmark = pytest.mark.usefixtures("cpu_engine")


def naive_adamw(
    values: torch.Tensor, gradients: list[torch.Tensor], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> torch.Tensor:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    p, m, v = values.double(), torch.zeros_like(values).double(), torch.zeros_like(values).double()
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * (m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps) + decay * p)
    return p


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize(("buckets", "pieces"), [(2**26, 2**26), (2**26, 8), (8, 8)])
def test_float32_is_bit_equal_to_torchs_adamw(
    optimizer_class: Any, buckets: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_module, "BUCKET_ELEMENTS", buckets)
    monkeypatch.setattr(adam_module, "HOST_PIECE_ELEMENTS", pieces)
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, reference = optimizer_class(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


class CopySizes(TorchDispatchMode):
    """Remembers the sizes of new tensors, and whether they are of a floating-point type."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function) or "clone" in str(function) or "div." in str(function):
            leaves = torch.utils._pytree.tree_leaves(result)
            self.sizes += [(tensor.numel(), tensor.is_floating_point()) for tensor in leaves]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_copied_a_piece_at_a_time_and_stay(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    start, gradient = torch.randn(1000, 8).to(dtype), torch.randn(1000, 8).to(dtype)
    weights = []
    for elements in (2**24, 100):
        monkeypatch.setattr(adam_module, "HOST_PIECE_ELEMENTS", elements)
        parameter = torch.nn.Parameter(start.clone())
        optimizer, copies = AdamOptimizer([parameter], **OPTIONS), CopySizes()
        for _ in range(3):
            parameter.grad = gradient.clone()
            copies.sizes.clear()
            with copies:
                optimizer.step(scale=4.0)
            assert torch.equal(parameter.grad, gradient)
        assert 90 < max(size for size, _ in copies.sizes) <= elements
        # One copy, and the counts of steps; besides, there are the bits of bfloat16 as integers.
        assert sum(size for size, is_float in copies.sizes if is_float) < 1.2 * gradient.numel()
        assert optimizer.state[parameter]["step"].item() == 3
        weights.append(parameter.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_float64_follows_the_naive_reference(optimizer_class: Any) -> None:
    (target, *_) = parameters(torch.float64)
    start, gradients = target.detach().clone(), []
    optimizer = optimizer_class([target], **OPTIONS)
    for step in range(10):
        give_gradients([target], step)
        assert target.grad is not None
        gradients.append(target.grad)
        optimizer.step()
    expected = naive_adamw(start, gradients, 1e-2, (0.8, 0.95), 1e-6, 0.1)
    torch.testing.assert_close(target.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_follows_float32_masters(optimizer_class: Any, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    masters = [torch.nn.Parameter(target.detach().float()) for target in ours]
    optimizer, reference = optimizer_class(ours, **OPTIONS), torch.optim.AdamW(masters, **OPTIONS, fused=True)
    for step in range(20):
        give_gradients(ours, step, scale=64)
        for target, master in zip(ours, masters, strict=True):
            assert target.grad is not None
            master.grad = target.grad.float() / 64
        optimizer.step(scale=64)
        reference.step()
        for target, master, own in zip(ours, masters, masters_of(optimizer), strict=True):
            assert torch.equal(target, master.to(dtype)), "a parameter is its master, rounded to nearest"
            assert torch.equal(own, master)


@pytest.mark.parametrize("dtype", HALVES)
def test_updates_smaller_than_half_precision_add_up(dtype: torch.dtype) -> None:
    target = torch.nn.Parameter(torch.full((10,), 1.0, dtype=dtype))
    optimizer = AdamOptimizer([target], lr=1e-5)
    for _ in range(2000):
        target.grad = torch.ones_like(target)
        optimizer.step()
    expected = torch.full((10,), 0.98).to(dtype)
    torch.testing.assert_close(target.detach(), expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_tiny_gradients_in_float16_do_not_vanish() -> None:
    target = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    target.grad = torch.full_like(target, 6e-8)
    AdamOptimizer([target], lr=0.1, eps=1e-10).step()
    assert torch.isfinite(target).all()
    assert target.detach().float().tolist() == pytest.approx([0.9] * 4, abs=1e-2)


def transposed(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(11, 7, generator=torch.Generator().manual_seed(0)).to(dtype).t()


def sliced(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(7, 23, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 1:12]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize(("make", "pieces"), [(transposed, 20), (sliced, 2**21)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_parameters_that_do_not_lie_row_by_row(
    optimizer_class: Any, make: Any, pieces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_module, "HOST_PIECE_ELEMENTS", pieces)
    target, twin = torch.nn.Parameter(make(dtype)), torch.nn.Parameter(make(dtype).contiguous())
    memory = torch.as_strided(target.detach(), (target.untyped_storage().size() // target.itemsize,), (1,), 0)
    before = memory.clone()
    assert not target.is_contiguous()
    for parameter in (target, twin):
        optimizer = optimizer_class([parameter], **OPTIONS)
        for step in range(3):
            give_gradients([parameter], step)
            optimizer.step()
        state = optimizer.state_dict()
        again = optimizer_class([parameter], **OPTIONS)
        again.load_state_dict(state)
        give_gradients([parameter], 3)
        again.step()
    torch.testing.assert_close(target.detach(), twin.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    with torch.no_grad():
        target.copy_(make(dtype))
    assert torch.equal(memory, before)  # what is not the parameter's has not changed


def test_parameters_without_a_gradient_stay() -> None:
    ours = parameters(torch.float16)
    give_gradients(ours[:1], 0)
    before = ours[1].detach().clone()
    optimizer = AdamOptimizer(ours, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(ours[1], before)
    assert ours[1] not in optimizer.state


def test_empty_parameters_are_fine() -> None:
    # A process may hold nothing of a small parameter that is sharded.
    ours = [*parameters(torch.bfloat16), torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))]
    give_gradients(ours, 0)
    optimizer = AdamOptimizer(ours)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert bmt.optim.clip_grad_norm(optimizer.param_groups, 1.0).isfinite()
    assert bmt.optim.clip_grad_norm(optimizer.param_groups, 1.0, norm_type="inf").isfinite()
    assert masters_of(optimizer)[-1].shape == (0,)


def test_gradients_are_left_as_they_are() -> None:
    ours = parameters(torch.float32)
    give_gradients(ours, 0)
    gradients = [target.grad.clone() for target in ours if target.grad is not None]
    AdamOptimizer(ours).step(scale=128)
    assert all(
        torch.equal(one, other.grad) for one, other in zip(gradients, ours, strict=True) if other.grad is not None
    )


def test_held_steps_gather_moments_only() -> None:
    (target, *_) = parameters(torch.float32)
    start, gradients = target.detach().clone(), []
    optimizer = AdamOptimizer([target], hold_steps=2, weight_decay=0.1)
    for step in range(3):
        assert torch.equal(target, start)
        give_gradients([target], step)
        assert target.grad is not None
        gradients.append(target.grad)
        optimizer.step()
    third = naive_adamw(start, gradients, 0.0, (0.9, 0.999), 1e-8, 0.0)
    assert torch.equal(third.float(), start)
    assert not torch.equal(target, start)
    m = sum(0.9 ** (2 - i) * 0.1 * g.double() for i, g in enumerate(gradients)) / (1 - 0.9**3)
    v = sum(0.999 ** (2 - i) * 0.001 * g.double() ** 2 for i, g in enumerate(gradients)) / (1 - 0.999**3)
    assert isinstance(v, torch.Tensor)
    expected = start.double() * (1 - 1e-3 * 0.1) - 1e-3 * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(target.detach(), expected.float())


def test_a_closure_computes_the_loss_again() -> None:
    (target, *_) = parameters(torch.float32)
    optimizer = AdamOptimizer([target])

    def closure() -> float:
        optimizer.zero_grad()
        loss = target.square().sum()
        loss.backward()
        return loss.item()

    expected = target.square().sum().item()
    assert optimizer.step(closure) == expected
    assert target.square().sum().item() < expected


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
    st.floats(1e-6, 1e-1),
    st.floats(0, 0.5),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_one_step_is_adams(gradient: list[float], lr: float, decay: float, dtype: torch.dtype) -> None:
    target = torch.nn.Parameter(torch.linspace(-2, 2, len(gradient)).to(dtype))
    start = target.detach().clone()
    target.grad = torch.tensor(gradient).to(dtype)
    AdamOptimizer([target], lr=lr, weight_decay=decay).step()
    expected = naive_adamw(start, [target.grad], lr, (0.9, 0.999), 1e-8, decay).to(dtype)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(target.detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "`lr` must be a finite number of at least 0, but is -1.0"),
        ({"lr": math.nan}, "`lr` must be a finite number of at least 0, but is nan"),
        ({"eps": -1e-8}, "`eps` must be a finite number of at least 0, but is -1e-08"),
        ({"weight_decay": -0.1}, "`weight_decay` must be a finite number of at least 0, but is -0.1"),
        ({"betas": (0.9, 1.0)}, r"`betas` must be two numbers of at least 0 and below 1, but is \(0.9, 1.0\)"),
        ({"hold_steps": -1}, "`hold_steps` must be a finite number of at least 0, but is -1"),
        ({"scale": 0.0}, "`loss_scale` must be a finite number above 0, but is 0.0"),
    ],
)
def test_values_out_of_range_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamOptimizer(parameters(torch.float32), **arguments)


def test_parameters_of_no_floating_point_type_are_an_error() -> None:
    whole = torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"`params` must be of floating-point types, but there are some of torch.int8"):
        AdamOptimizer([whole])


def test_old_gpus_have_no_kernels_which_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capability = {"cuda:7": (7, 5), "cuda:8": (9, 0)}
    monkeypatch.setattr(tensors, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[str(device)])
    for _ in range(2):
        assert not tensors.runs_triton(torch.device("cuda:7"))
        assert tensors.runs_triton(torch.device("cuda:8"))
    tensors.runs_triton.cache_clear()
    (record,) = caplog.records
    assert "without their fast kernels on cuda:7, because the GPU's compute capability is 7.5" in record.getMessage()
