"""Learning-rate schedules against their closed forms, and resuming."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center.engine.lr_scheduler import Cosine, Exponential, Linear, Noam, NoDecay, WarmupLRScheduler

START, WARMUP, END = 0.5, 4, 20
DECAY: dict[Any, Callable[[int], float]] = {
    Noam: lambda n: START / n**0.5,
    Linear: lambda n: max(0.0, START * (END - n) / (END - WARMUP)),
    Cosine: lambda n: START * (1 + math.cos(math.pi * (n - WARMUP) / (END - WARMUP))) / 2 if n < END else 0.0,
    Exponential: lambda n: START * 0.95 ** (n - WARMUP),
    NoDecay: lambda n: START,
}
SCHEDULES: list[Any] = list(DECAY)


def rate(schedule: type[WarmupLRScheduler], n: int) -> float:
    if n >= WARMUP:
        return DECAY[schedule](n)
    return START * n / WARMUP**1.5 if schedule is Noam else START * n / WARMUP


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    return torch.optim.SGD(groups, lr=7.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rates_are_those_of_the_formula(schedule: Any) -> None:
    target = optimizer()
    running = schedule(target, start_lr=START, warmup_iter=WARMUP, end_iter=END)
    for n in range(30):
        assert running.num_iter == n
        assert running.current_lr == pytest.approx(rate(schedule, n), rel=1e-12, abs=1e-15)
        assert [group["lr"] for group in target.param_groups] == [running.current_lr] * 2
        running.step()


def test_a_table_to_look_at() -> None:
    """Numbers worked out by hand, so that formulas and code cannot share a mistake."""
    noam = Noam(optimizer(), 3e-3, 10, -1)
    rates = []
    for _ in range(41):
        rates.append(noam.current_lr)
        noam.step()
    assert rates[0] == 0
    assert rates[5] == pytest.approx(4.7434164902525685e-4)
    assert rates[10] == pytest.approx(9.486832980505137e-4)
    assert rates[40] == pytest.approx(4.743416490252569e-4)
    cosine = Cosine(optimizer(), 1.0, 0, 100)
    cosine.step(50)
    assert cosine.current_lr == pytest.approx(0.5)
    cosine.step(25)
    assert cosine.current_lr == pytest.approx(0.8535533905932737)


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(deadline=None)
@given(first=st.integers(0, 25), more=st.integers(0, 10))
def test_a_schedule_resumes_anywhere(schedule: Any, first: int, more: int) -> None:
    running = schedule(optimizer(), START, WARMUP, END)
    for _ in range(first):
        running.step()
    target = optimizer()
    resumed = schedule(target, 9.0, 1, 30)
    resumed.load_state_dict(running.state_dict())
    started = schedule(optimizer(), START, WARMUP, END, num_iter=first)
    for _ in range(more + 1):
        assert resumed.current_lr == started.current_lr == running.current_lr == target.param_groups[0]["lr"]
        for each in (running, resumed, started):
            each.step()
    assert resumed.state_dict() == running.state_dict()


def test_the_state_is_bmtrains() -> None:
    assert Linear(optimizer(), 0.1, 2, 9, 3).state_dict() == {
        "start_lr": 0.1,
        "warmup_iter": 2,
        "end_iter": 9,
        "num_iter": 3,
    }


def test_no_warmup_starts_at_once() -> None:
    for schedule in SCHEDULES:
        assert schedule(optimizer(), 0.5, 0, 10).current_lr == 0.5


def test_cosine_and_linear_stay_at_the_end() -> None:
    for schedule in (Cosine, Linear):
        assert schedule(optimizer(), 0.5, 2, 10, num_iter=10).current_lr == 0
        assert schedule(optimizer(), 0.5, 2, 10, num_iter=15).current_lr == 0


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (Noam, {"start_lr": -1.0}, "`start_lr` must be a finite number of at least 0, but is -1.0"),
        (Noam, {"start_lr": math.inf}, "`start_lr` must be a finite number of at least 0, but is inf"),
        (NoDecay, {"warmup_iter": -3}, "`warmup_iter` must be at least 0, but is -3"),
        (NoDecay, {"num_iter": -1}, "`num_iter` must be at least 0, but is -1"),
        (Linear, {"end_iter": -1}, r"`end_iter` must be greater than `warmup_iter` \(4\), but is -1"),
        (Cosine, {"end_iter": 4}, r"`end_iter` must be greater than `warmup_iter` \(4\), but is 4"),
        (Exponential, {"gamma": 1.5}, "`gamma` must be above 0 and at most 1, but is 1.5"),
    ],
)
def test_values_out_of_range_are_errors(schedule: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(optimizer(), **{"start_lr": START, "warmup_iter": WARMUP, "end_iter": END, **arguments})


def test_a_foreign_state_is_an_error_and_changes_nothing() -> None:
    schedule = Exponential(optimizer(), START, WARMUP, END, 3)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=r"the state of a Exponential schedule must hold .*gamma"):
        schedule.load_state_dict(Noam(optimizer(), 1.0, 2, 3).state_dict())
    assert schedule.state_dict() == before
