"""What a run leaves behind that is killed or interrupted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_encoder import write_encoder, write_task

from model_center.recipe import evaluate_checkpoint, read_metrics, read_status
from model_center.recipe.cli import main

COMMAND = Path(sys.executable).with_name("model-center")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    model, data = write_encoder(folder / "model"), write_task(folder / "data")
    return ["finetune", "--model.name", str(model), "--data.path", str(data), "--data.max_length", "32"]


@pytest.fixture
def endless(inputs: list[str], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that would go on for hours, in a process of its own, in `tmp_path/run`."""
    process = subprocess.Popen(
        [COMMAND, *inputs, "--epochs", "100000", "--output", tmp_path / "run"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    yield process
    process.kill()
    process.wait()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["status.json", "checkpoints/last"])
def test_a_killed_run_does_not_look_finished(
    endless: subprocess.Popen[str], inputs: list[str], tmp_path: Path, moment: str
) -> None:
    run = tmp_path / "run"
    wait_for(run / moment, endless)
    endless.send_signal(signal.SIGKILL)
    endless.wait()
    assert read_status(run)["state"] == "running"
    if (run / "metrics.jsonl").exists():
        steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
        assert steps == list(range(1, len(steps) + 1))
    if (run / "checkpoints" / "last").exists():
        evaluate_checkpoint(run / "checkpoints" / "last", inputs[4])
    with pytest.raises(SystemExit):
        main([*inputs, "--max_steps", "1", "--output", str(run)])
    assert main([*inputs, "--max_steps", "1", "--output", str(run), "--overwrite"]) == 0
    assert read_status(run)["state"] == "finished"


def test_an_interrupted_run_is_readable(endless: subprocess.Popen[str], inputs: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    wait_for(run / "checkpoints" / "last", endless)
    endless.send_signal(signal.SIGINT)
    _, errors = endless.communicate(timeout=60)
    assert endless.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"interrupted; {run} holds the metrics and checkpoints so far"
    assert read_status(run)["state"] == "interrupted"
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    evaluate_checkpoint(run / "checkpoints" / "last", inputs[4])
