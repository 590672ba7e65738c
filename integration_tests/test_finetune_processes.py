"""`model-center finetune` in two processes, which torchrun starts or which are forked, against one process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_training import exit_codes, start_processes
from tiny_encoder import write_encoder, write_task
from tiny_prompts import write_model, write_prompt_task

from model_center.recipe import evaluate_checkpoint, read_metrics, read_status
from model_center.recipe.cli import main


def numbers(run: Path, kind: str, name: str) -> list[Any]:
    return [record[name] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same global batches, without dropout: the same losses, scores and checkpoint."""
    model = write_encoder(tmp_path / "model", dropout_p=0.0, att_dropout_p=0.0)
    data = write_task(tmp_path / "data", train=96, dev=31)  # an odd number: the processes' shares differ
    inputs = ["--model.name", str(model), "--data.path", str(data), "--data.max_length", "32", "--model.dropout", "0"]
    options = ["--optimizer.learning_rate", "3e-3", "--epochs", "2"]
    compare(tmp_path, data, [*inputs, *options], samples=[31, 31], launch=with_torchrun)


def test_two_processes_write_answers_as_one(tmp_path: Path) -> None:
    """Answers of different lengths: each target token counts the same, and no process stops writing before the other.

    Also in the last step, in which one process has a row more than the other.
    """
    model = write_model(tmp_path / "model", "t5")
    data = write_prompt_task(tmp_path / "data", "SQuAD", train=61, dev=31)
    inputs = ["--model.name", str(model), "--data.path", str(data), "--data.task", "SQuAD", "--data.max_length", "48"]
    options = ["--data.bucket_by_length", "false", "--engine.zero_level", "2", "--optimizer.learning_rate", "1e-2"]
    compare(tmp_path, data, [*inputs, *options, "--epochs", "3"], samples=[31] * 3, launch=forked)


def with_torchrun(words: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "model_center.recipe", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dev ") == 2, done.stdout  # in the description of the run, and in its result


def forked(words: list[str]) -> None:
    assert exit_codes(start_processes(command, 2, words)) == [0, 0]


def command(words: list[str]) -> None:
    raise SystemExit(main(words))


def compare(
    folder: Path, data: Path, inputs: list[str], samples: list[int], launch: Callable[[list[str]], None]
) -> None:
    """Train in one process and in two, with the same global batches."""
    options = ["finetune", *inputs]
    assert main([*options, "--output", str(folder / "one"), "--data.batch_size", "8"]) == 0
    launch([*options, "--data.batch_size", "4", "--output", str(folder / "two")])
    one, two = folder / "one", folder / "two"
    assert read_status(two)["state"] == "finished"
    for kind, name in (("train", "loss"), ("train", "gradient_norm"), ("evaluation", "loss"), ("evaluation", "score")):
        assert numbers(two, kind, name) == pytest.approx(numbers(one, kind, name), rel=1e-4), name
    assert numbers(two, "evaluation", "samples") == samples
    assert evaluate_checkpoint(two / "checkpoints" / "last", data).loss == pytest.approx(
        numbers(two, "evaluation", "loss")[-1], rel=1e-4
    )
