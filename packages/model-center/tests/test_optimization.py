import math

import pytest
import torch

from model_center.engine.optim import AdamOffloadOptimizer, AdamOptimizer
from model_center.recipe.configuration import OptimizerOptions, Schedule
from model_center.recipe.optimization import loss_scale_for, make_optimizer, make_scheduler


def rates(schedule: Schedule, steps: int, warmup_ratio: float) -> list[float]:
    options = OptimizerOptions(learning_rate=1e-3, schedule=schedule, warmup_ratio=warmup_ratio)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), options)
    scheduler = make_scheduler(optimizer, options, steps)
    found = []
    for _ in range(steps):
        found.append(scheduler.current_lr)
        assert optimizer.param_groups[0]["lr"] == scheduler.current_lr
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["linear", "cosine", "noam", "constant"])
@pytest.mark.parametrize(("steps", "warmup_ratio"), [(1, 0.0), (1, 1.0), (20, 0.0), (20, 0.25), (20, 1.0)])
def test_every_step_has_a_rate_and_the_highest_is_the_given_one(
    schedule: Schedule, steps: int, warmup_ratio: float
) -> None:
    found = rates(schedule, steps, warmup_ratio)
    assert min(found) > 0
    assert max(found) <= 1e-3 * (1 + 1e-9)
    warmup = round(steps * warmup_ratio)
    if warmup:
        assert found[:warmup] == pytest.approx([1e-3 * step / warmup for step in range(1, warmup + 1)])


def test_linear_schedule_by_hand() -> None:
    assert rates("linear", 5, 0.4) == pytest.approx([0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_warmup_in_steps_takes_the_place_of_the_ratio() -> None:
    options = OptimizerOptions(learning_rate=1e-3, schedule="constant", warmup_ratio=0.5, warmup_steps=2)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), options)
    assert make_scheduler(optimizer, options, 8).current_lr == pytest.approx(0.5e-3)
    with pytest.raises(ValueError, match=r"optimizer\.warmup_steps must be at most the run's 1 steps, but is 2"):
        make_scheduler(optimizer, options, 1)


def test_noam_schedule_by_hand() -> None:
    assert rates("noam", 8, 0.25) == pytest.approx(
        [0.5e-3, 1e-3, *(1e-3 * math.sqrt(2 / step) for step in range(3, 9))]
    )


def test_optimizer_options_arrive() -> None:
    options = OptimizerOptions(learning_rate=3e-4, weight_decay=0.2, beta1=0.8, beta2=0.95)
    group = make_optimizer(torch.nn.Linear(2, 2), options).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-4, 0.2, (0.8, 0.95))
    assert type(make_optimizer(torch.nn.Linear(2, 2), options)) is AdamOptimizer
    offload = OptimizerOptions(offload=True)
    assert isinstance(make_optimizer(torch.nn.Linear(2, 2), offload), AdamOffloadOptimizer)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, None), (torch.bfloat16, None), (torch.float16, 2.0**16)]
)
def test_only_float16_needs_a_loss_scale(dtype: torch.dtype, expected: float | None) -> None:
    assert loss_scale_for(torch.nn.Linear(2, 2, dtype=dtype)) == expected
