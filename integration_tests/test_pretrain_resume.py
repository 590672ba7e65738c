"""A pre-training run that is killed, or asked to stop, goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STEPS = 12
OPTIONS = f"""
max_steps: {STEPS}
model:
  name: gpt2-base
  precision: fp32
  options:
    vocab_size: 301
    dim_model: 16
    num_heads: 2
    dim_head: 8
    dim_ff: 32
    num_layers: 2
    position_size: 32
    dropout_p: 0.1
    emb_init_std: 0.02
data:
  tokenizer: train:300
  max_length: 32
  validation_share: 0.2
batch: {{global_size: 8, micro_size: 4}}
optimizer: {{learning_rate: 1e-2, warmup_steps: 2}}
checkpoints: {{every_steps: 3, every_minutes: null, asynchronous: false}}
validation: {{every_steps: 4}}
"""
WORDS = ["the", "old", "king", "walked", "to", "a", "river", "and", "sang", "of", "winter", "light"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration and a text."""
    folder = tmp_path_factory.mktemp("pretrain")
    lines = [" ".join(WORDS[(line * place) % 12] for place in range(1, 10 + line % 7)) for line in range(120)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "run.yaml").write_text(OPTIONS)
    return folder


def command(folder: Path, output: str, *more: str) -> list[str]:
    program = [sys.executable, "-m", "model_center.recipe", "pretrain", f"--config={folder / 'run.yaml'}"]
    data = [f"--data.path={folder / 'data'}", f"--data.text={folder / 'text.txt'}"]
    return [*program, *data, f"--output={folder / output}", "--log_every=1", *more]


def run(folder: Path, output: str, *more: str) -> str:
    done = subprocess.run(command(folder, output, *more), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(folder: Path, output: str) -> list[tuple[str, int, float]]:
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()
    ]
    return [(record["kind"], record["step"], record["loss"]) for record in records]


@pytest.fixture(scope="module")
def straight(folder: Path) -> str:
    """A run without interruption."""
    output = run(folder, "straight")
    assert "validation    loss" in output
    return "straight"


def assert_same_run(folder: Path, first: str, second: str) -> None:
    assert losses(folder, first) == losses(folder, second)
    last = f"checkpoints/step-{STEPS:08d}"
    for file in ("model.safetensors", "optimizer-00001-of-00001.safetensors"):
        expected, found = (load_file(folder / name / last / file) for name in (first, second))
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"the run ended before step {step}")


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit(folder: Path, straight: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command(folder, "killed"), stdout=subprocess.PIPE, text=True, env=environment)
    wait_for_step(process, 8)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert json.loads((folder / "killed" / "status.json").read_text())["state"] == "running"
    again = run(folder, "killed", "--resume=auto")
    assert "resumed after step 6" in again
    assert_same_run(folder, straight, "killed")
    assert json.loads((folder / "killed" / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_signal_saves_and_ends(folder: Path, straight: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command(folder, "stopped"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    wait_for_step(process, 4)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 130
    assert "--resume auto goes on from there" in errors
    assert json.loads((folder / "stopped" / "status.json").read_text())["state"] == "interrupted"
    run(folder, "stopped", "--resume=auto")
    assert_same_run(folder, straight, "stopped")


def test_an_existing_run_is_neither_mixed_nor_lost(folder: Path, straight: str) -> None:
    before = (folder / straight / "metrics.jsonl").read_text()
    done = subprocess.run(command(folder, straight), capture_output=True, text=True, timeout=250)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert (folder / straight / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_passed_over(folder: Path, straight: str) -> None:
    shutil.copytree(folder / straight, folder / "damaged")
    weights = folder / "damaged" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    again = run(folder, "damaged", "--resume=auto")
    assert f"passed over a damaged checkpoint: step-{STEPS:08d}/model.safetensors: " in again
    assert "resumed after step 9" in again
    assert_same_run(folder, straight, "damaged")
