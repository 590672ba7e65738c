"""Loss scaling, clipping and steps, in both generations of the interface."""

import copy
import io
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center import engine as bmt
from model_center.engine.optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager, clip_grad_norm, optim_step

pytestmark = pytest.mark.usefixtures("cpu_engine")


def parameter(dtype: torch.dtype = torch.float16) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 6).to(dtype))


def groups(*gradients: torch.Tensor) -> list[dict[str, Any]]:
    parameters = []
    for gradient in gradients:
        parameters.append(torch.nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    return [{"params": parameters[:1]}, {"params": parameters[1:]}]


gradient_lists = st.lists(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(deadline=None)
@given(
    values=gradient_lists,
    norm_type=st.sampled_from([1, 2, 3, math.inf, "inf"]),
    max_norm=st.floats(1e-2, 1e3),
    scale=st.sampled_from([1.0, 8.0, 1000.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_clipping_is_that_of_one_vector(
    values: list[list[float]], norm_type: float | str, max_norm: float, scale: float, dtype: torch.dtype
) -> None:
    gradients = [torch.tensor(each).to(dtype) for each in values]
    vector = torch.cat(gradients).double()
    expected = torch.linalg.vector_norm(vector, float(norm_type)) / scale
    param_groups = groups(*gradients)
    norm = clip_grad_norm(param_groups, max_norm, norm_type=norm_type, scale=scale)
    assert norm.dtype is torch.float32
    assert norm.item() == pytest.approx(expected.item(), rel=1e-4)
    clipped = torch.cat([p.grad for group in param_groups for p in group["params"]]).double()
    factor = min(1.0, max_norm / (expected.item() + 1e-6))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(clipped, vector * factor, rtol=4 * eps + 1e-4, atol=torch.finfo(dtype).tiny)


def test_a_norm_above_the_largest_float16_is_finite() -> None:
    param_groups = groups(torch.full((100, 100), 60000.0, dtype=torch.float16))
    norm = clip_grad_norm(param_groups, max_norm=1.0, scale=65536)
    assert norm.item() == pytest.approx(60000 * 100 / 65536, rel=1e-5)
    assert param_groups[0]["params"][0].grad.float().norm().item() == pytest.approx(65536, rel=1e-2)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("norm_type", [2, "inf"])
def test_gradients_that_are_not_finite_are_left_for_the_overflow_check(bad: float, norm_type: float | str) -> None:
    param_groups = groups(torch.tensor([1.0, bad]), torch.tensor([30.0]))
    assert not clip_grad_norm(param_groups, max_norm=1.0, norm_type=norm_type).isfinite()
    assert param_groups[1]["params"][0].grad.item() == 30.0


def test_clipping_nothing() -> None:
    assert clip_grad_norm([{"params": [parameter()]}], max_norm=1.0).item() == 0.0


def test_an_infinite_maximum_measures_only() -> None:
    param_groups = groups(torch.tensor([3.0]), torch.tensor([4.0]))
    assert clip_grad_norm(param_groups, max_norm=math.inf).item() == 5.0
    assert param_groups[1]["params"][0].grad.item() == 4.0


@pytest.mark.parametrize("name", ["max_norm", "norm_type", "scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_clipping_refuses_nonsense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be above 0, but is {value}"):
        clip_grad_norm([], **{"max_norm": 1.0, name: value})


@pytest.mark.parametrize("optimizer_class", [AdamOptimizer, AdamOffloadOptimizer])
def test_the_loss_scale_is_for_float16_only(optimizer_class: Any) -> None:
    assert optimizer_class([parameter(torch.float32)]).scale == 1
    assert optimizer_class([parameter(torch.bfloat16)]).scale == 1
    optimizer = optimizer_class([parameter(torch.bfloat16), parameter(torch.float16)])
    assert optimizer.scale == 65536
    assert optimizer.loss_scale(torch.tensor(0.5)).item() == 32768


def test_an_overflow_skips_the_step_and_halves_the_scale(caplog: pytest.LogCaptureFixture) -> None:
    target = parameter()
    before = target.detach().clone()
    optimizer = AdamOptimizer([target], scale=1024)
    schedule = bmt.lr_scheduler.NoDecay(optimizer, 0.1, 0, -1)
    (target.sum() * 60000).mul(optimizer.scale).backward()
    with caplog.at_level(logging.WARNING):
        assert not optim_step(optimizer, schedule)
    assert "gradient overflow: step skipped, loss scale 1024 -> 512" in caplog.text
    assert optimizer.scale == 512
    assert target.grad is None
    assert torch.equal(target, before)
    assert schedule.num_iter == 0
    optimizer.loss_scale(target.sum()).backward()
    assert optim_step(optimizer, schedule)
    assert schedule.num_iter == 1
    assert torch.equal(target, (before.float() - 0.1).half())


def test_the_scale_grows_after_enough_good_steps_and_stays_in_its_bounds() -> None:
    target = parameter()
    manager = OptimManager(loss_scale=4, loss_scale_steps=3, max_loss_scale=16, min_loss_scale=2)
    manager.add_optimizer(AdamOptimizer([target], lr=0.0))
    seen = []
    for good in [True] * 7 + [False] * 4 + [True] * 3:
        manager.zero_grad()
        manager.backward(target.sum() * (1.0 if good else 60000.0) * (1.0 if good else 1e6))
        assert manager.step() is good
        seen.append(manager.loss_scale)
    assert seen == [4, 4, 8, 8, 8, 16, 16, 8, 4, 2, 2, 2, 2, 4]


def test_without_a_scale_nothing_is_checked() -> None:
    target = parameter(torch.float32)
    manager = OptimManager()
    manager.add_optimizer(AdamOptimizer([target]))
    assert manager.loss_scale == 1
    assert not manager.loss_scale_enabled
    manager.backward(target.sum() * math.inf)
    assert manager.step()
    assert target.isnan().all()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("optimizer_class", [AdamOptimizer, AdamOffloadOptimizer, torch.optim.AdamW, torch.optim.SGD])
def test_the_scale_does_not_show_in_the_result(optimizer_class: Any, scale: float) -> None:
    target, plain = parameter(torch.float32), parameter(torch.float32)
    manager = OptimManager(loss_scale=scale)
    optimizer, reference = optimizer_class([target], lr=0.1), optimizer_class([plain], lr=0.1)
    manager.add_optimizer(optimizer, bmt.lr_scheduler.NoDecay(optimizer, 0.1, 0, -1))
    for _ in range(3):
        manager.zero_grad()
        manager.backward(target.pow(3).sum())
        norm = manager.clip_grad_norm(optimizer.param_groups, max_norm=0.5)
        reference.zero_grad()
        plain.pow(3).sum().backward()
        expected = clip_grad_norm(reference.param_groups, max_norm=0.5)
        assert norm.item() == pytest.approx(expected.item())
        assert manager.step()
        reference.step()
    torch.testing.assert_close(target, plain, rtol=1e-6, atol=1e-7)


def test_optim_step_takes_torchs_optimizers_and_schedules() -> None:
    target = parameter(torch.float32)
    optimizer = torch.optim.SGD([target], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    target.sum().backward()
    assert optim_step(optimizer, schedule)
    assert torch.equal(target, torch.linspace(-1, 1, 6) - 1)
    assert optimizer.param_groups[0]["lr"] == 0.5


def make_manager(parameters: list[torch.nn.Parameter]) -> OptimManager:
    manager = OptimManager(loss_scale=64, loss_scale_steps=5)
    adam = AdamOptimizer(parameters[:1], lr=1e-2, weight_decay=1e-2)
    offload = AdamOffloadOptimizer(parameters[1:2], lr=1e-2)
    manager.add_optimizer(adam, bmt.lr_scheduler.Noam(adam, 1e-1, 4, -1))
    manager.add_optimizer(offload, bmt.lr_scheduler.Exponential(offload, 1e-1, 4, -1))
    manager.add_optimizer(torch.optim.AdamW(parameters[2:3], lr=1e-2))
    sgd = torch.optim.SGD(parameters[3:], lr=1e-2, momentum=0.9)
    manager.add_optimizer(sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 20))
    return manager


def run(manager: OptimManager, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        manager.zero_grad()
        noise = torch.randn(6, generator=torch.Generator().manual_seed(step))
        manager.backward(torch.stack([(p.float() * noise).pow(2).sum() for p in parameters]).sum())
        for optimizer in manager.optimizers:
            manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        manager.step()


def test_a_manager_resumes_bit_by_bit_with_every_optimizer() -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float32]
    ours = [parameter(dtype) for dtype in dtypes]
    manager = make_manager(ours)
    run(manager, ours, range(7))
    file = io.BytesIO()
    torch.save(manager.state_dict(), file)
    file.seek(0)
    twins = [copy.deepcopy(target) for target in ours]
    resumed = make_manager(twins)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.loss_scale == manager.loss_scale == 128
    for each, parameters in ((manager, ours), (resumed, twins)):
        run(each, parameters, range(7, 14))
    assert resumed.loss_scale == manager.loss_scale == 256
    assert all(torch.equal(one, other) for one, other in zip(ours, twins, strict=True))


def test_a_state_of_other_optimizers_is_an_error() -> None:
    manager = OptimManager()
    manager.add_optimizer(AdamOptimizer([parameter()]))
    other = OptimManager()
    optimizer = AdamOptimizer([parameter()])
    other.add_optimizer(optimizer, bmt.lr_scheduler.NoDecay(optimizer, 0.1, 0, -1))
    with pytest.raises(ValueError, match=r"a schedule is \[False\] here, but \[True\] there"):
        manager.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_scale": 0}, "`loss_scale` must be a finite number above 0, but is 0"),
        ({"loss_scale_factor": 0.5}, "`loss_scale_factor` must be above 1, but is 0.5"),
        ({"loss_scale_steps": 0}, "`loss_scale_steps` must be at least 1, but is 0"),
        ({"min_loss_scale": 8, "max_loss_scale": 4}, r"`min_loss_scale` must be .* `max_loss_scale` \(4\), but is 8"),
        ({"grad_scale": 0}, "`grad_scale` must be above 0, but is 0"),
    ],
)
def test_values_out_of_range_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimManager(**arguments)


def test_the_documented_loop_learns() -> None:
    """The training loop of the document's quick start, in float16 on a task that has a solution."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3, 8, dtype=torch.float16))
    inputs = torch.randn(64, 8)
    labels = (inputs @ torch.randn(8, 3)).argmax(1)
    optimizer = bmt.optim.AdamOffloadOptimizer([weight])
    lr_scheduler = bmt.lr_scheduler.Noam(optimizer, start_lr=5e-1, warmup_iter=10, end_iter=-1)
    loss_func = bmt.loss.FusedCrossEntropy(ignore_index=-100)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        logits = inputs.half() @ weight.t()
        loss = loss_func(logits, labels)
        losses.append(loss.item())
        loss = optimizer.loss_scale(loss)
        loss.backward()
        grad_norm = bmt.optim.clip_grad_norm(optimizer.param_groups, max_norm=10.0, scale=optimizer.scale, norm_type=2)
        bmt.optim_step(optimizer, lr_scheduler)
        line = f"loss: {bmt.sum_loss(loss).item():.4f} | lr: {lr_scheduler.current_lr:.4e} | grad_norm: {grad_norm:.4f}"
        assert "nan" not in line
    assert losses[0] == pytest.approx(math.log(3), rel=1e-3)
    assert losses[-1] < 0.2
