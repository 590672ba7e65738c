import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from safetensors.torch import load_file
from strict_json import strict_loads

from model_center.recipe.cli import main
from model_center.recipe.metrics import JsonLines, StepMetrics, ValidationMetrics
from model_center.recipe.report import read_records, summarize, table_of
from model_center.recipe.run_directory import open_run


@pytest.fixture(scope="module")
def finetuned(encoder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finetuned"
    arguments = ["--model.name", str(encoder), "--data.path", str(tasks), "--data.max_length", "32", "--epochs", "1"]
    assert main(["finetune", *arguments, "--max_steps", "4", "--output", str(path)]) == 0
    return path


WHOLE = '{"format_version": 1, "state": "finished", "updated": "2026-01-01T00:00:00+00:00"}'
CONFIG = "max_steps: 100\nmodel:\n  name: some/where/gpt2-tiny\ndata:\n  path: /data/books\n"


def step_metrics(step: int, **more: Any) -> StepMetrics:
    return StepMetrics(
        step=step, epoch=0.1, loss=3 + 1 / step, learning_rate=1e-4, gradient_norm=1.0, seconds=0.5,
        samples_per_second=16.0, tokens=1000, tokens_per_second=2000.0, tflops=100.0 + step % 2, peak_share=0.25,
        **more,
    )  # fmt: skip


def pretrain(path: Path, *, steps: int = 60, **summary: Any) -> None:
    """Write what a pre-training run leaves, whose loss is 3 + 1/step, and 2.9 + 1/step in validation."""
    with open_run(path, CONFIG) as run:
        run.status["summary"] = summary
        recorder = JsonLines(run.metrics)
        for step in range(1, steps + 1):
            recorder.record(step_metrics(step, memory_gib=7 + step / steps))
            if step % 20 == 0:
                recorder.record(ValidationMetrics(step=step, loss=math.nan if step == 60 else 2.9 + 1 / step, tokens=9))
        recorder.close()


def shown(*runs: Path) -> dict[str, list[str]]:
    """Return the table's rows as a reader sees them."""
    text = io.StringIO()
    table = table_of([summarize(run, read_records(run)) for run in runs])
    Console(file=text, width=400).print(table)
    rows = [[cell.strip() for cell in line.split("│")] for line in text.getvalue().splitlines() if "│" in line]
    return {name: cells for name, *cells in rows}


def test_runs_side_by_side(finetuned: Path, tmp_path: Path) -> None:
    pretrain(tmp_path / "a", parameters=12_345_678, predicted_memory_gib=8.25)
    rows = shown(finetuned, tmp_path / "a")
    weights = load_file(finetuned / "checkpoints" / "last" / "model.safetensors")
    parameters = sum(weight.numel() for weight in weights.values())
    assert rows["state"] == ["finished", "finished"]
    assert rows["model"] == ["tiny-bert", "gpt2-tiny"]
    assert rows["parameters"] == [f"{parameters:,}", "12.3 million"]
    assert rows["data"] == ["BoolQ", "books"]
    assert rows["steps"] == ["4", "60"]
    assert rows["tokens"] == ["–", "60,000"]
    assert rows["tokens/s"] == ["–", "2,000"]
    assert rows["training loss"][1] == "3.0167"
    assert rows["final loss"][1] == "nan"
    assert rows["best loss"][1] == "2.9250"
    assert rows["best score"][0].endswith("% accuracy")
    assert rows["memory, GiB"] == ["–", "8.00"]
    assert rows["predicted, GiB"] == ["–", "8.25"]
    assert rows["time in steps"][1] == "0:30"
    assert rows["operations"] == ["–", "100 TFLOP/s"]  # half of the steps 100, half 101
    assert rows["share of peak"] == ["–", "25.0%"]
    assert rows["perplexity"][1] == "nan"
    assert "time left" not in rows
    assert "anomalies" not in rows


def test_crashed_and_running_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss is nan"), open_run(tmp_path / "failed", CONFIG):
        raise ValueError("the loss is nan")
    with open_run(tmp_path / "running", CONFIG) as run:
        recorder = JsonLines(run.metrics)
        recorder.record(step_metrics(25))
        recorder.record(ValidationMetrics(step=25, loss=9.0, tokens=10))
        with run.metrics.open("a") as file:
            file.write('{"kind": "tra')
        (run.path / "checkpoints" / "step-1").mkdir(parents=True)
        (run.path / "checkpoints" / "step-1" / "model.safetensors").write_bytes(b"half")
        rows = shown(tmp_path / "failed", tmp_path / "running")
        recorder.close()
    assert rows["error"] == ["ValueError: the loss is nan", "–"]
    assert rows["state"][0] == "failed"
    assert rows["state"][1].startswith("running (last sign 0:0")
    assert rows["final loss"] == ["–", "9.0000"]
    assert rows["time left"] == ["–", "0:38"]  # 75 steps of half a second
    assert "parameters" not in rows


def test_json_is_valid_and_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tmp_path / "a")
    assert main(["report", "--json", str(tmp_path / "a")]) == 0
    (found,) = strict_loads(capsys.readouterr().out)
    assert found["run"] == str(tmp_path / "a")
    assert found["best_loss"] == pytest.approx(2.925)
    assert found["final_loss"] is None
    assert found["tokens"] == 60_000


def test_plot_of_several_runs(finetuned: Path, tmp_path: Path) -> None:
    pretrain(tmp_path / "a")
    pretrain(tmp_path / "empty", steps=0)
    runs = [str(tmp_path / "a"), str(finetuned), str(tmp_path / "empty")]
    pictures = []
    for count in (1, 3):
        file = tmp_path / f"{count}.png"
        assert main(["report", *runs[:count], "--plot", str(file)]) == 0
        pictures.append(imread(file))
    assert pictures[0].shape == pictures[1].shape == (750, 1500, 4)
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run directory: there is no such directory"),
        ({}, "is not a run directory: status.json cannot be read"),
        ({"status.json": "[]"}, "has no format_version"),
        ({"status.json": '{"format_version": 9}'}, "has format version 9; this version reads up to 1"),
        ({"status.json": '{"format_version": 1}'}, "its status.json has no state and no updated"),
        ({"status.json": WHOLE, "metrics.jsonl": "no JSON\n"}, "metrics.jsonl is damaged"),
        ({"status.json": WHOLE, "metrics.jsonl": "{}\n"}, "metrics.jsonl is damaged"),
        ({"status.json": WHOLE, "config.yaml": "a: b: c"}, "config.yaml is damaged"),
    ],
)
def test_what_is_no_run(
    content: dict[str, str] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "run").mkdir()
        for name, text in content.items():
            (tmp_path / "run" / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "run")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: runs"), (["a", "--plot", "x.txt"], "plot must be a file that ends in .png, .pdf, .svg")],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
