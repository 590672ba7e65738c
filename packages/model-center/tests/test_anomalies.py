import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from model_center.recipe.anomalies import LossWatch, Verdict, count_reports, report_batch
from model_center.recipe.pretrain_configuration import WatchOptions


def watch(**options: Any) -> LossWatch:
    return LossWatch(WatchOptions(**{"window": 8, "divergence": None, **options}))


def fine(watch: LossWatch, first: int, last: int) -> None:
    """Steps whose losses are 2.0 and up to 0.1 around it."""
    for step in range(first, last + 1):
        assert watch.judge(step, 2.0 + 0.1 * math.sin(step), 1.0) == Verdict("fine")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", ["warn", "skip", "rewind", "stop"])
def test_a_loss_that_is_no_number(policy: str, loss: float) -> None:
    verdict = watch(non_finite=policy).judge(1, loss, 1.0)
    assert verdict == Verdict(policy, f"the loss is {loss}")  # type: ignore[arg-type]


def test_gradients_that_are_no_numbers() -> None:
    assert watch().judge(1, 2.0, math.inf) == Verdict("skip", "the gradient norm is inf (loss 2)")
    assert LossWatch(WatchOptions(), scales_loss=True).judge(1, 2.0, math.inf) == Verdict("fine")


def test_a_spike_stands_out_of_the_last_losses() -> None:
    found = watch(spike="stop", factor=10.0)
    assert found.judge(0, 100.0, 1.0).action == "fine"  # nothing to measure it against yet
    fine(found, 1, 8)
    verdict = found.judge(9, 4.0, 1.0)
    assert verdict.action == "stop"
    assert verdict.reason.startswith("the loss is 4, ")
    assert "median of the last 8 steps" in verdict.reason
    assert found.judge(9, 2.3, 1.0).action == "fine"
    assert found.judge(10, 0.1, 1.0).action == "fine"  # losses may fall as they like


def test_a_flat_curve_has_no_spikes_of_a_percent() -> None:
    found = watch(spike="stop", factor=10.0)
    for step in range(8):
        assert found.judge(step, 2.0, 1.0).action == "fine"
    assert found.judge(8, 2.1, 1.0).action == "fine"
    assert found.judge(9, 2.5, 1.0).action == "stop"


def test_noise_is_not_taken_for_spikes() -> None:
    generator = random.Random(0)
    found = LossWatch(WatchOptions(spike="stop"))
    for step in range(5000):
        loss = 8 / (1 + step / 500) + 2 + generator.gauss(0, 0.2)
        assert found.judge(step, loss, 1.0).action == "fine", step


def test_with_warnings_a_new_level_becomes_the_norm() -> None:
    found = watch(spike="warn")
    fine(found, 1, 8)
    actions = [found.judge(step, 5.0 + 0.1 * math.sin(step), 1.0).action for step in range(9, 25)]
    assert actions[0] == "warn"
    assert actions[-8:] == ["fine"] * 8


def test_losses_that_stay_far_above_the_first_one_stop_the_run() -> None:
    found = watch(divergence=2.0, patience=3)
    losses = [5.0, 4.0, 11.0, 12.0, 13.0, 4.0, 10.5, 30.0, math.inf, 20.0, 30.0]
    verdicts = [found.judge(step, loss, 1.0) for step, loss in enumerate(losses)]
    assert [verdict.action for verdict in verdicts] == [*["fine"] * 8, "skip", "fine", "stop"]
    assert verdicts[-1].reason == (
        "the loss is 30 and has been above 2 times that of the first step (5) for 4 steps (watch.divergence)"
    )


def test_a_rewind_begins_to_count_divergence_anew() -> None:
    found = watch(divergence=2.0, patience=3)
    for step, loss in enumerate((5.0, 11.0, 12.0, 13.0)):
        found.judge(step, loss, 1.0)
    found.rewound(0)
    assert found.judge(1, 14.0, 1.0).action == "fine"


def test_skipped_losses_do_not_count_and_too_many_in_a_row_stop_the_run() -> None:
    found = watch(spike="skip", patience=3)
    fine(found, 1, 8)
    assert [found.judge(step, 50.0, 1.0).action for step in (9, 10, 11)] == ["skip"] * 3
    fine(found, 12, 12)
    assert [found.judge(step, 50.0, 1.0).action for step in (13, 14, 15)] == ["skip"] * 3
    verdict = found.judge(16, 50.0, 1.0)
    assert verdict.action == "stop"
    assert "3 steps in a row were skipped before" in verdict.reason


def test_rewinds_leave_their_batches_out_and_are_counted() -> None:
    found = watch(non_finite="rewind", max_rewinds=2)
    fine(found, 1, 20)
    assert found.judge(21, math.nan, 1.0).action == "rewind"
    found.rewound(16)
    assert max(step for step, _ in found.losses) == 16
    fine(found, 17, 20)
    assert found.excludes(21)
    assert not found.excludes(20)
    fine(found, 22, 22)
    assert found.judge(23, math.nan, 1.0).action == "rewind"
    found.rewound(16)
    verdict = found.judge(17, math.nan, 1.0)
    assert verdict == Verdict("stop", "the loss is nan, after 2 rewinds (watch.max_rewinds)")


@pytest.mark.parametrize("cut", [0, 5, 9, 30])
def test_a_resumed_watch_judges_as_if_it_had_never_been_interrupted(cut: int) -> None:
    generator = random.Random(cut)
    losses = [generator.choice([2.0, 2.1, 2.2, 9.0, math.nan]) + generator.random() for _ in range(60)]
    options = {"spike": "skip", "non_finite": "rewind", "max_rewinds": 9, "patience": 4}
    straight, interrupted = watch(**options), watch(**options)
    expected = [straight.judge(step, loss, 1.0) for step, loss in enumerate(losses)]
    assert {verdict.action for verdict in expected} >= {"fine", "skip", "rewind"}
    found = [interrupted.judge(step, losses[step], 1.0) for step in range(cut)]
    resumed = watch(**options)
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict(), allow_nan=False)))
    found += [resumed.judge(step, losses[step], 1.0) for step in range(cut, 60)]
    assert found == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [("spike", "ignore"), ("non_finite", ""), ("window", 1), ("factor", 0.0), ("patience", 0), ("max_rewinds", 0)],
)
def test_wrong_options(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"watch\.{option} must be .*, but is {value!r}"):
        WatchOptions(**{option: value})


class Letters:
    """As much of a tokenizer as a report needs."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(96 + number) for number in token_ids)


def test_report_of_a_batch(tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "loss": math.nan,
        "gradient_norm": math.inf,
        "samples": range(20000),
        "rows": [[1, 2, 3], [4] * 9000] * 20,
    }
    verdict = Verdict("skip", "the loss is nan")
    file = report_batch(tmp_path, 123, verdict, **report, tokenizer=Letters())  # type: ignore[arg-type]
    assert file == tmp_path / "anomalies" / "step-000123.json"
    assert file.stat().st_size < 100_000

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    written = json.loads(file.read_text(), parse_constant=refuse)
    assert written["excerpts"][:2] == ["abc", "d" * 500]
    assert written["loss"] == "nan"
    assert written["samples"] == list(range(4096))
    assert written["samples_in_all"] == 20000
    ids = json.loads(report_batch(tmp_path, 124, verdict, **report).read_text())["excerpts"]
    assert ids[:2] == [[1, 2, 3], [4] * 500]
    assert count_reports(tmp_path) == {"skip": 2}
