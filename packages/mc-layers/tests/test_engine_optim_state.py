"""State of the optimizers: it restores bit by bit, moves between them and between processes, and is checked."""

import copy
import io
import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from optimizer_cases import HALVES, OPTIMIZERS, OPTIONS, give_gradients, masters_of, parameters

from model_center.engine.optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager, optim_step

pytestmark = pytest.mark.usefixtures("cpu_engine")


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
