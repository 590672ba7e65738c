"""Optimizers against torch.optim.AdamW and a naive float64 reference; state that restores bit by bit."""

import copy
import io
import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model_center import engine as bmt
from model_center.engine import tensors
from model_center.engine.optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager, optim_step
from model_center.engine.optim import adam as adam_module

OPTIMIZERS: list[Any] = [AdamOptimizer, AdamOffloadOptimizer]
HALVES = [torch.float16, torch.bfloat16]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
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


def parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (3,), (2, 3, 4)]
    return [torch.nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in shapes]


def give_gradients(targets: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> None:
    source = torch.Generator().manual_seed(100 + step)
    for target in targets:
        target.grad = (torch.randn(target.shape, generator=source) * scale).to(target.dtype)


def masters_of(optimizer: Any) -> list[torch.Tensor]:
    return [state["master"] for state in optimizer.state_dict()["state"].values()]


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


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_state_restores_bit_by_bit(optimizer_class: Any, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    optimizer = optimizer_class([{"params": ours[:1], "lr": 3e-3}, {"params": ours[1:]}], **OPTIONS, scale=32)
    for step in range(5):
        give_gradients(ours, step)
        optimizer.step()
    optimizer.scaler.succeeded()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [target.detach() for target in ours]), file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    twins = [torch.nn.Parameter(value) for value in values]
    twin = optimizer_class([{"params": twins[:1]}, {"params": twins[1:]}])
    twin.load_state_dict(state)
    for step in range(5, 10):
        for each, targets in ((optimizer, ours), (twin, twins)):
            give_gradients(targets, step)
            each.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, twins, strict=True))
    assert twin.scaler == optimizer.scaler
    assert [group["lr"] for group in twin.param_groups] == [3e-3, 1e-2]
    for one, other in zip(ours, twins, strict=True):
        assert optimizer.state[one].keys() == twin.state[other].keys()
        assert all(torch.equal(twin.state[other][name], tensor) for name, tensor in optimizer.state[one].items())
        assert twin.state[other]["exp_avg"].dtype is torch.float32


def test_float16_that_goes_on_from_float32_scales_its_loss() -> None:
    weights, halves = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    weights.grad = torch.ones(4)
    plain, scaling = OptimManager(), OptimManager(loss_scale=8.0)
    for manager, parameter in ((plain, weights), (scaling, halves)):
        manager.add_optimizer(AdamOptimizer([parameter]))
    assert plain.step()
    scaling.load_state_dict(plain.state_dict())
    optimizer = scaling.optimizers[0]
    assert isinstance(optimizer, AdamOptimizer)
    for step in (scaling.step, partial(optim_step, optimizer)):
        halves.grad = torch.full_like(halves, torch.inf)
        assert not step()
    assert (scaling.loss_scale, optimizer.scale) == (4.0, 32768.0)
    assert halves.detach().tolist() == [1.0] * 4


def test_a_loss_scale_comes_with_the_first_float16_parameters() -> None:
    (first, *_), (second, *_) = parameters(torch.float32), parameters(torch.float16)
    optimizer = AdamOptimizer([first])
    assert (optimizer.scale, optimizer.scaler.enabled) == (1.0, False)
    optimizer.add_param_group({"params": [second]})
    assert (optimizer.scale, optimizer.scaler.enabled) == (65536.0, True)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_copy_goes_on_as_the_original(optimizer_class: Any) -> None:
    ours = parameters(torch.float16)
    optimizer = optimizer_class(ours, **OPTIONS)
    give_gradients(ours, 0)
    assert optim_step(optimizer)
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for each, targets in ((optimizer, ours), (twin, twins)):
        give_gradients(targets, 1)
        assert optim_step(each)
    assert all(torch.equal(one, other) for one, other in zip(ours, twins, strict=True))


def transposed(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(11, 7, generator=torch.Generator().manual_seed(0)).to(dtype).t()


def sliced(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(7, 23, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 1:12]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("make", [transposed, sliced])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_parameters_that_do_not_lie_row_by_row(
    optimizer_class: Any, make: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_module, "HOST_PIECE_ELEMENTS", 20)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_moves_shard_by_shard(dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    optimizer = AdamOptimizer(ours, lr=3e-3, betas=(0.8, 0.9))
    give_gradients(ours[:2], 0)  # the last never has one
    optimizer.step()
    shards = {(shard.index, shard.name): shard for shard in optimizer.shards()}
    assert {index for index, _ in shards} == {0, 1}
    assert ((0, "master") in shards) == (dtype is torch.bfloat16)
    assert (shards[0, "exp_avg"].start, shards[0, "exp_avg"].shape) == (0, tuple(ours[0].shape))
    options = json.loads(json.dumps(optimizer.options(), allow_nan=False))
    twin = AdamOptimizer(ours)

    def read(index: int, name: str, held: range) -> torch.Tensor | None:
        shard = shards.get((index, name))
        return None if shard is None else shard.read()[held.start : held.stop]

    twin.load_shards(options, read)
    assert twin.scaler == optimizer.scaler
    assert (twin.param_groups[0]["lr"], list(twin.param_groups[0]["betas"])) == (3e-3, [0.8, 0.9])
    assert [parameter is ours[index] for index, parameter in enumerate(twin.state)] == [True, True]
    for parameter, state in twin.state.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, optimizer.state[parameter][name]), name
            assert tensor.data_ptr() != optimizer.state[parameter][name].data_ptr()
    del shards[1, "exp_avg"]
    with pytest.raises(ValueError, match="the state must have `exp_avg` of parameter 1, whose other parts are there"):
        twin.load_shards(options, read)
    shards[1, "exp_avg"] = replace(shards[0, "exp_avg"], read=torch.zeros(2).clone)
    with pytest.raises(ValueError, match="the state `exp_avg` of parameter 1 must have 3 elements here, but has 2"):
        twin.load_shards(options, read)


def test_state_is_copied_and_moves_between_the_two_optimizers() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = AdamOptimizer(ours)
    give_gradients(ours, 0)
    optimizer.step()
    twins = copy.deepcopy(ours)
    offload = AdamOffloadOptimizer(twins)
    offload.load_state_dict(optimizer.state_dict())
    give_gradients(twins, 1)
    offload.step()
    assert not torch.equal(masters_of(offload)[0], masters_of(optimizer)[0])
    give_gradients(ours, 1)
    optimizer.step()
    for one, other in zip(masters_of(offload), masters_of(optimizer), strict=True):
        assert torch.equal(one, other)
    optimizer.load_state_dict(offload.state_dict())
    for one, other in zip(masters_of(offload), masters_of(optimizer), strict=True):
        assert torch.equal(one, other)


def test_a_float32_state_gives_half_precision_parameters_their_masters() -> None:
    ours = parameters(torch.float32)
    optimizer = AdamOptimizer(ours)
    give_gradients(ours, 0)
    optimizer.step()
    half = [torch.nn.Parameter(target.detach().bfloat16()) for target in ours]
    halved = AdamOptimizer(half)
    halved.load_state_dict(optimizer.state_dict())
    assert torch.equal(masters_of(halved)[0], half[0].float())
    assert torch.equal(halved.state[half[0]]["exp_avg"], optimizer.state[ours[0]]["exp_avg"])


def test_a_state_of_other_parameters_is_an_error_and_changes_nothing() -> None:
    ours = parameters(torch.float32)
    optimizer = AdamOptimizer(ours)
    give_gradients(ours, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    torch_state = torch.optim.AdamW(ours).state_dict()
    fewer = AdamOptimizer(ours[:2]).state_dict()
    misshaped = copy.deepcopy(before)
    misshaped["state"][2]["exp_avg"] = torch.ones(24)
    lacking = copy.deepcopy(before)
    del lacking["state"][0]["exp_avg_sq"]
    for state, message in (
        (torch_state, "the state is not that of AdamOptimizer: its groups lack `hold_steps`"),
        (fewer, r"the state must be of parameter groups of \[3\] parameters, but is of \[2\]"),
        (misshaped, r"the state `exp_avg` of parameter 2 must be of shape \(2, 3, 4\), but is of shape \(24,\)"),
        (lacking, "the state must have `exp_avg_sq` of parameter 0, whose other parts are there"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][0][name], tensor) for name, tensor in before["state"][0].items())


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
