import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model_center.recipe.metrics import EvaluationMetrics, JsonLines, StepMetrics, TensorBoard, read_metrics
from model_center.recipe.plot import plot_run, trailing_mean
from model_center.recipe.progress import LiveProgress, PlainProgress, show_progress


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
    names = {f"train/{name}" for name in vars(step(1)) if name != "step"}
    names |= {"evaluation/loss", "evaluation/accuracy", "evaluation/macro_f1"}
    assert set(events.Tags()["scalars"]) == names


@pytest.mark.parametrize("steps", [0, 1, 4, 80])
def test_plot_of_any_length(tmp_path: Path, steps: int) -> None:
    plot_run(write_run(tmp_path / "metrics.jsonl", steps), tmp_path / "plot.png", "a run")
    picture = imread(tmp_path / "plot.png")
    assert picture.shape == (630, 1500, 4)
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 20  # a blank picture has one colour


def test_plot_shows_other_numbers_differently(tmp_path: Path) -> None:
    for steps in (8, 12):
        plot_run(write_run(tmp_path / f"{steps}.jsonl", steps), tmp_path / f"{steps}.png", "a run")
    assert not np.array_equal(imread(tmp_path / "8.png"), imread(tmp_path / "12.png"))


@pytest.mark.parametrize("window", [1, 3, 100])
def testtrailing_mean(window: int) -> None:
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    naive = [values[max(0, end - window) : end].mean() for end in range(1, len(values) + 1)]
    np.testing.assert_allclose(trailing_mean(values, window), naive)


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
        "step 4/10 | epoch 1.00 | loss 0.2500 | lr 1.00e-04 | gradient 2.00 | 32.0 samples/s | left 0:03"
    )
    assert "| accuracy 75.0% | macro_f1 70.0% | accuracy of the majority class 50.0% |" in lines[-1]


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
