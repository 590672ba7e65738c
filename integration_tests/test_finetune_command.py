"""`model-center finetune`, from the command line to what it leaves on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_encoder import write_encoder, write_task

from model_center.model import Bert
from model_center.recipe import evaluate_checkpoint, read_metrics, read_status
from model_center.recipe.cli import main

LEARNS = ["--data.max_length", "32", "--data.batch_size", "8", "--optimizer.learning_rate", "5e-3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `data` and the directory `run` of a whole run."""
    folder = tmp_path_factory.mktemp("finetune")
    write_encoder(folder / "model")
    write_task(folder / "data", train=192)
    assert finetune(folder, "run", "--epochs", "4") == 0
    return folder


def arguments(folder: Path, run: str, *options: str) -> list[str]:
    needed = ["--model.name", folder / "model", "--data.path", folder / "data", "--output", folder / run]
    return ["finetune", *map(str, needed), *LEARNS, *options]


def finetune(folder: Path, run: str, *options: str) -> int:
    return main(arguments(folder, run, *options))


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Everything a run computed: its metrics without times, and the tensors of its checkpoints."""
    timeless = [
        {name: value for name, value in record.items() if name not in ("seconds", "samples_per_second")}
        for record in read_metrics(run / "metrics.jsonl")
    ]
    tensors = {
        f"{file.relative_to(run)}:{name}": tensor
        for file in sorted(run.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    return timeless, tensors


def same(first: Path, second: Path) -> bool:
    (metrics, tensors), (other_metrics, other_tensors) = outcome(first), outcome(second)
    return metrics == other_metrics and all(
        torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items()
    )


def test_metrics_of_every_step_and_epoch(folder: Path) -> None:
    steps, evaluations = records(folder / "run", "train"), records(folder / "run", "evaluation")
    assert [record["step"] for record in steps] == list(range(1, 97))
    assert [record["epoch"] for record in steps][23::24] == [1.0, 2.0, 3.0, 4.0]
    assert [record["step"] for record in evaluations] == [24, 48, 72, 96]
    assert max(record["learning_rate"] for record in steps) == pytest.approx(5e-3)
    assert all(record["gradient_norm"] > 0 and record["samples_per_second"] > 0 for record in steps)
    losses = [record["loss"] for record in steps]
    assert np.mean(losses[-24:]) < 0.5 * np.mean(losses[:24])
    last = evaluations[-1]
    assert last["score"] == last["scores"]["accuracy"] >= 0.9
    assert (last["measure"], last["baseline"], last["samples"]) == ("accuracy", 0.5, 32)


def test_status_and_tensorboard_agree_with_the_metrics(folder: Path) -> None:
    run = folder / "run"
    status, evaluations = read_status(run), records(run, "evaluation")
    assert status["state"] == "finished"
    best = max(evaluations, key=lambda record: record["score"])
    for name, expected in (("best", best), ("last", evaluations[-1])):
        assert {"kind": "evaluation", **status["result"][name]} == expected
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag, kind, name in (("train/loss", "train", "loss"), ("evaluation/loss", "evaluation", "loss")):
        expected_values = [(record["step"], pytest.approx(record[name])) for record in records(run, kind)]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected_values
    accuracies = [event.value for event in events.Scalars("evaluation/accuracy")]
    assert accuracies == pytest.approx([record["score"] for record in evaluations])


def test_the_plot_is_a_picture(folder: Path) -> None:
    picture = imread(folder / "run" / "plot.png")
    assert picture.shape[:2] == (630, 1500)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_reload_for_evaluation(folder: Path, name: str) -> None:
    run = folder / "run"
    expected = read_status(run)["result"][name]
    found = evaluate_checkpoint(run / "checkpoints" / name, folder / "data", batch_size=5)
    assert found.scores == expected["scores"]
    assert found.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert evaluate_checkpoint(run / "checkpoints" / name, folder / "data", split="train").samples == 192
    Bert.from_pretrained(run / "checkpoints" / name)


def test_a_run_can_start_from_the_checkpoint_of_another(folder: Path) -> None:
    start = str(folder / "run" / "checkpoints" / "best")
    assert finetune(folder, "continued", "--model.name", start, "--max_steps", "1", "--model.pooling", "cls") == 0
    assert read_status(folder / "continued")["state"] == "finished"


def test_the_resolved_configuration_reproduces_the_run_bit_for_bit(folder: Path) -> None:
    config = folder / "run" / "config.yaml"
    assert yaml.safe_load(config.read_text())["epochs"] == 4
    assert main(["finetune", "--config", str(config), "--output", str(folder / "again")]) == 0
    assert same(folder / "run", folder / "again")
    assert main(["finetune", "--config", str(config), "--output", str(folder / "other"), "--seed", "1"]) == 0
    assert not same(folder / "run", folder / "other")


def test_options_change_what_they_say(folder: Path) -> None:
    """Each of these runs differs from the first one; an option that is accepted and ignored would not."""
    finetune(folder, "plain", "--max_steps", "3")
    changes = [
        ("--model.pooling", "cls"),
        ("--model.dropout", "0.5"),
        ("--model.precision", "bf16"),
        ("--data.batch_size", "4"),
        ("--data.max_length", "9"),
        ("--data.bucket_by_length", "false"),
        ("--optimizer.schedule", "cosine"),
        ("--optimizer.warmup_ratio", "1"),
        ("--optimizer.weight_decay", "0.5"),
        ("--optimizer.beta1", "0.5"),
        ("--optimizer.beta2", "0.9"),
        ("--optimizer.max_gradient_norm", "1e-4"),
        ("--epochs", "1"),
    ]
    for option, value in changes:
        steps = "12" if option == "--epochs" else "3"
        assert finetune(folder, "changed", "--overwrite", "--max_steps", steps, option, value) == 0
        assert not same(folder / "plain", folder / "changed"), option
    # Neither of these changes the numbers.
    for option, value in (("--data.eval_batch_size", "7"), ("--optimizer.offload", "true"), ("--log_every", "1")):
        assert finetune(folder, "changed", "--overwrite", "--max_steps", "3", option, value) == 0
        weights = [load_file(folder / run / "checkpoints/last/model.safetensors") for run in ("plain", "changed")]
        assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0]), option
