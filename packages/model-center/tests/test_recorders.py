import io
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from rich.console import Console
from strict_json import strict_loads
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model_center.recipe.metrics import (
    EvaluationMetrics,
    JsonLines,
    StepMetrics,
    TensorBoard,
    ValidationMetrics,
    read_metrics,
    valid_records,
)
from model_center.recipe.plot import Plot, plot_run, trailing_mean
from model_center.recipe.progress import LiveProgress, PlainProgress, duration, show_progress


def step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number,
        epoch=number / 4,
        loss=1 / number,
        learning_rate=1e-4,
        gradient_norm=2.0,
        seconds=0.5,
        samples_per_second=32.0,
    )


def pretraining_step(number: int, loss: float | None = None) -> StepMetrics:
    known: dict[str, Any] = {"tokens": 4096, "tokens_per_second": 8192.0, "tflops": 45.25, "peak_share": 0.046}
    known |= {"memory_gib": 12.34, "loss_scale": 1024.0}
    return replace(step(number), **known | ({} if loss is None else {"loss": loss}))


def evaluation(number: int, score: float = 0.75) -> EvaluationMetrics:
    return EvaluationMetrics(
        step=number,
        epoch=number / 4,
        loss=0.5,
        measure="accuracy",
        score=score,
        baseline=0.5,
        scores={"accuracy": score, "macro_f1": 0.7},
        samples=8,
    )


def write_run(path: Path, steps: int) -> Path:
    recorder = JsonLines(path)
    for number in range(1, steps + 1):
        recorder.record(step(number))
        if number % 4 == 0:
            recorder.record(evaluation(number, score=0.5 + number / 100))
    recorder.close()
    return path


def test_json_lines_can_be_read_while_the_run_goes_on_and_after_it_was_killed(tmp_path: Path) -> None:
    recorder = JsonLines(tmp_path / "metrics.jsonl")
    recorder.record(step(1))
    recorder.record(evaluation(1))
    expected = [
        {"kind": "train", "step": 1, "epoch": 0.25, "loss": 1.0, "learning_rate": 1e-4, "gradient_norm": 2.0,
         "seconds": 0.5, "samples_per_second": 32.0},
        {"kind": "evaluation", "step": 1, "epoch": 0.25, "loss": 0.5, "measure": "accuracy", "score": 0.75,
         "baseline": 0.5, "scores": {"accuracy": 0.75, "macro_f1": 0.7}, "samples": 8},
    ]  # fmt: skip
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == expected
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == expected


def test_tensorboard_events_hold_every_number(tmp_path: Path) -> None:
    recorder = TensorBoard(tmp_path)
    for number in (1, 2):
        recorder.record(step(number))
    recorder.record(evaluation(2))
    recorder.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [event.value for event in events.Scalars("evaluation/accuracy")] == [0.75]
    names = {f"train/{name}" for name, value in vars(step(1)).items() if name != "step" and value is not None}
    names |= {"evaluation/loss", "evaluation/accuracy", "evaluation/macro_f1"}
    assert set(events.Tags()["scalars"]) == names


def test_json_lines_go_on_after_a_resume_without_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first, last, resumed_after in ((1, 7, None), (5, 9, 4)):
        recorder = JsonLines(path, resumed_after=resumed_after)
        for number in range(first, last + 1):
            recorder.record(pretraining_step(number))
            recorder.record(ValidationMetrics(step=number, loss=1.0, tokens=10))
        recorder.close()
        with path.open("a") as file:
            file.write('{"kind": "tra')  # as a killed process leaves it
    records = list(read_metrics(path))
    assert [(record["kind"], record["step"]) for record in records] == [
        (kind, number) for number in range(1, 10) for kind in ("train", "validation")
    ]
    assert records[0]["tokens_per_second"] == 8192.0
    assert records[1] == {"kind": "validation", "step": 1, "loss": 1.0, "tokens": 10, "perplexity": math.e}
    assert records[2]["perplexity"] == pytest.approx(math.exp(records[2]["loss"]))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null_and_read_as_nan(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "metrics.jsonl"
    scores = {"accuracy": math.nan, "macro_f1": 0.7}
    for resumed_after in (None, 9):  # the second time what the file holds is written again
        recorder = JsonLines(path, resumed_after=resumed_after)
        if resumed_after is None:
            recorder.record(replace(pretraining_step(1, loss), gradient_norm=loss))
            recorder.record(replace(evaluation(1), loss=loss, scores=scores))
        recorder.close()
        first, last = map(strict_loads, path.read_text().splitlines())
        assert first["loss"] is first["gradient_norm"] is last["loss"] is last["scores"]["accuracy"] is None
        assert (first["seconds"], last["score"], last["scores"]["macro_f1"]) == (0.5, 0.75, 0.7)
        assert "memory_gib" in first
        train, evaluated = read_metrics(path)
        for value in (train["loss"], train["gradient_norm"], evaluated["loss"], evaluated["scores"]["accuracy"]):
            assert math.isnan(value)


def test_files_with_names_of_numbers_are_read_and_made_valid(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "validation", "step": 1, "loss": NaN, "tokens": 3, "perplexity": Infinity}\n')
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])
    assert record["perplexity"] == math.inf
    JsonLines(path, resumed_after=1).close()
    assert strict_loads(path.read_text())["loss"] is None


def test_a_new_run_does_not_go_on_in_an_old_file(tmp_path: Path) -> None:
    for number in (1, 2):
        recorder = JsonLines(tmp_path / "metrics.jsonl")
        recorder.record(step(number))
        recorder.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2]


def test_records_that_a_rewind_has_undone_do_not_count(tmp_path: Path) -> None:
    recorder = JsonLines(tmp_path / "metrics.jsonl")
    for loss, steps in ((1.0, (1, 2, 3, 4, 5)), (2.0, (3, 4, 5, 6))):
        for number in steps:
            recorder.record(pretraining_step(number, loss))
            if number == 4:
                recorder.record(ValidationMetrics(step=4, loss=loss, tokens=10))
    recorder.close()
    records = valid_records(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (4, 2.0), (5, 2.0), (6, 2.0),
    ]  # fmt: skip


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    for steps, resumed_after in (((1, 2, 3, 4), None), ((3, 4, 5), 2)):
        recorder = TensorBoard(tmp_path, resumed_after=resumed_after)
        for number in steps:
            recorder.record(pretraining_step(number))
        recorder.record(ValidationMetrics(step=steps[-1], loss=1.0, tokens=10))
        recorder.close()
        time.sleep(1.1)  # TensorBoard orders files by the second they were begun in, as a resumed process's are
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/tflops")] == [1, 2, 3, 4, 5]
    assert [(event.step, event.value) for event in events.Scalars("validation/perplexity")] == [
        (5, pytest.approx(math.e))
    ]


@pytest.mark.parametrize(
    ("loss", "perplexity"),
    [(0.0, 1.0), (3.0, math.e**3), (900.0, math.inf), (math.inf, math.inf), (math.nan, math.nan)],
)
def test_perplexity(loss: float, perplexity: float) -> None:
    found = ValidationMetrics(step=1, loss=loss, tokens=1).perplexity
    assert found == pytest.approx(perplexity, nan_ok=True)


@pytest.mark.parametrize("steps", [0, 1, 4, 80])
def test_plot_of_any_length(tmp_path: Path, steps: int) -> None:
    plot_run(write_run(tmp_path / "metrics.jsonl", steps), tmp_path / "plot.png", "a run")
    picture = imread(tmp_path / "plot.png")
    assert picture.shape == (630, 1500, 4)
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 20  # a blank picture has one colour


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_plot_of_pretraining(tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    recorder = JsonLines(tmp_path / "metrics.jsonl")
    for number in range(1, steps + 1):
        recorder.record(pretraining_step(number, math.nan if number == 50 else None))
        if number % 40 == 0:
            loss = math.nan if number == 40 else 1.1 / number
            recorder.record(ValidationMetrics(step=number, loss=loss, tokens=10))
    recorder.close()
    monkeypatch.setattr(Axes, "annotate", lambda axes, text, *rest, **options: notes.append(text))
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "plot.png", "a run")
    best = [f"best {1.1 / 200:.3f} (perplexity {math.exp(1.1 / 200):.4g})"]
    assert notes == (best if steps == 200 else [])
    picture = imread(tmp_path / "plot.png")
    assert picture.shape == (1350, 1500, 4)
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 20


def test_drawing_takes_little_of_a_runs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing takes two seconds here, so that the next one is two hundred seconds later, and one is at the end."""
    now, drawn_at = 0.0, []

    def draw(metrics: Path, picture: Path, title: str) -> None:
        nonlocal now
        drawn_at.append(now)
        now += 2

    monkeypatch.setattr("model_center.recipe.plot.plot_run", draw)
    monkeypatch.setattr("model_center.recipe.plot.monotonic", lambda: now)
    plot = Plot(tmp_path / "metrics.jsonl", tmp_path / "plot.png", "a run")
    for number in range(1, 50):
        now = max(now, 10.0 * number)
        plot.record(step(number))
        plot.record(evaluation(number))
    assert drawn_at == [10, 220, 430]
    now = 500.0
    plot.close()
    assert drawn_at[3:] == [500]
    plot.close()
    assert len(drawn_at) == 4


def test_plot_shows_other_numbers_differently(tmp_path: Path) -> None:
    for steps in (8, 12):
        plot_run(write_run(tmp_path / f"{steps}.jsonl", steps), tmp_path / f"{steps}.png", "a run")
    assert not np.array_equal(imread(tmp_path / "8.png"), imread(tmp_path / "12.png"))


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("values", [[3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [math.nan, 1.0, math.nan, 2.0, math.inf, 5.0]])
def test_trailing_mean(values: list[float], window: int) -> None:
    naive = []
    for end in range(1, len(values) + 1):
        last = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        naive.append(sum(last) / len(last) if last else math.nan)
    np.testing.assert_allclose(trailing_mean(np.array(values), window), naive)


def test_plain_lines_where_the_output_is_no_terminal() -> None:
    text = io.StringIO()
    progress = show_progress(Console(file=text, width=40), total_steps=10, log_every=4)
    assert isinstance(progress, PlainProgress)
    for number in range(1, 11):
        progress.record(step(number))
    progress.record(evaluation(10))
    progress.close()
    lines = text.getvalue().splitlines()
    assert [line.split(" |")[0] for line in lines] == [
        "step 1/10", "step 4/10", "step 8/10", "step 10/10", "evaluation after step 10 (epoch 2.50): loss 0.5000",
    ]  # fmt: skip
    assert lines[1] == (
        "step 4/10 | epoch 1.00 | loss 0.2500 | lr 1.00e-04 | gradient norm 2.00 | 32.0 samples/s | left 0:03"
    )
    assert "| accuracy 75.0% | macro_f1 70.0% | accuracy of the commonest answer 50.0% |" in lines[-1]


def test_plain_lines_of_pretraining() -> None:
    text = io.StringIO()
    progress = PlainProgress(Console(file=text, width=40), total_steps=20000, log_every=100)
    for number in range(1001, 1101):  # as after a resume
        progress.record(pretraining_step(number, 3.0))
    progress.record(ValidationMetrics(step=1100, loss=3.0, tokens=65536))
    lines = text.getvalue().splitlines()
    numbers = "loss 3.0000 | lr 1.00e-04 | gradient norm 2.00 | 8,192 tokens/s | perplexity 20.09"
    numbers += " | 45.2 TFLOP/s (4.6% of peak) | 12.3 GiB | scale 1024"
    assert lines == [
        f"step 1001/20000 | epoch 250.25 | {numbers} | left 2:38:20",
        f"step 1100/20000 | epoch 275.00 | {numbers} | left 2:37:30",
        "validation after step 1100: loss 3.0000 | perplexity 20.09 | 65,536 tokens",
    ]


def test_time_left_follows_the_speed_of_the_last_steps() -> None:
    text = io.StringIO()
    progress = PlainProgress(Console(file=text, width=40), total_steps=1000, log_every=1)
    for number in range(1, 301):
        progress.record(replace(step(number), seconds=100.0 if number <= 200 else 2.0))
    assert text.getvalue().splitlines()[-1].endswith("left 23:20")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (200000, "2d 07:33")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_live_lines_of_pretraining() -> None:
    text = io.StringIO()
    progress = LiveProgress(Console(file=text, force_terminal=True, width=80), total_steps=100)
    progress.record(pretraining_step(40, 3.0))
    progress.record(ValidationMetrics(step=40, loss=3.0, tokens=65536))
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert re.search(r"40/100 loss 3\.000 lr 1\.0e-04 8,192 tokens/s left 0:30", shown), shown
    assert "perplexity 20.09 | gradient norm 2.00 | 45.2 TFLOP/s (4.6% of peak) | 12.3 GiB" in shown
    assert "validation after step 40: loss 3.0000" in shown


@pytest.mark.parametrize("width", [80, 150])
def test_live_bar_on_a_terminal(width: int) -> None:
    text = io.StringIO()
    progress = show_progress(Console(file=text, force_terminal=True, width=width), total_steps=9999, log_every=1)
    assert isinstance(progress, LiveProgress)
    for number in range(1, 5):
        progress.record(step(number))
    progress.record(evaluation(4))
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert re.search(r"epoch 1\.00 .*4/9999 loss 0\.250 lr 1\.0e-04 32\.0 samples/s left (\d+:\d\d|--:--)", shown), (
        shown
    )
    assert "accuracy 75.0%" in shown


def test_a_diverged_loss_is_recorded_and_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"kind": "train"} | vars(step(1)) | {"loss": math.nan}) + "\n"
        + json.dumps({"kind": "train"} | vars(step(2)) | {"loss": math.inf}) + "\n"
    )  # fmt: skip
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "plot.png", "a run")
    assert (tmp_path / "plot.png").stat().st_size > 0
