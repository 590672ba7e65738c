"""A pre-training run that is killed, or asked to stop, goes on as if nothing had happened, on any number of processes.

Most runs are of processes forked from one that has imported everything; the killed one starts the command itself.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pretraining_runs import (
    RESHARDED,
    STEPS,
    assert_resharded,
    assert_same_run,
    run,
    run_whole,
    state,
    words,
    write_inputs,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def straight(folder: Path) -> str:
    """A run without interruption."""
    assert "validation    loss" in run_whole(folder, "straight").text
    return "straight"


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"the run ended before step {step}")


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit(folder: Path, straight: str) -> None:
    command = [sys.executable, "-m", "model_center.recipe", *words(folder, "killed")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    wait_for_step(process, STEPS // 2 + 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert state(folder, "killed") == "running"
    again = subprocess.run([*command, "--resume=auto"], capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stderr
    resumed = re.search(r"resumed after step (\d+) ", again.stdout)
    assert resumed is not None
    assert resumed[1] in ("90", "100", "110")  # the last one may not have been complete
    assert_same_run(folder, straight, "killed")


@pytest.mark.slow
def test_two_processes_go_on_bit_by_bit(folder: Path) -> None:
    steps = 24
    options = (f"--max_steps={steps}", "--validation.every_steps=12")
    run_whole(folder, "two", *options, processes=2)
    run(folder, "two-killed", *options, processes=2, stop=15, number=signal.SIGKILL)
    assert "resumed after step" in run_whole(folder, "two-killed", *options, "--resume=auto", processes=2).text
    assert_same_run(folder, "two", "two-killed", steps)


@pytest.mark.slow
def test_other_numbers_of_processes_train_on_the_same_samples(folder: Path) -> None:
    expected = run_whole(folder, "alone", *RESHARDED)
    assert_resharded(folder, "alone", "resharded", expected, ["torch"] * 4)


def test_a_signal_saves_and_ends(folder: Path, straight: str) -> None:
    option = "--checkpoints.asynchronous=false"
    ended = run(folder, "stopped", option, stop=4, number=signal.SIGTERM)
    assert ended.codes == [130]
    assert "interrupted after step 5, which was saved; this goes on from there:\n" in ended.text
    assert state(folder, "stopped") == "interrupted"
    goes_on = shlex.join(words(folder, "stopped", option, "--resume", "auto"))
    assert ended.text.endswith(f"\ntorchrun ... -m model_center.recipe {goes_on}\n")
    run_whole(folder, "stopped", option, "--resume=auto")
    assert_same_run(folder, straight, "stopped")


def test_an_existing_run_is_neither_mixed_nor_lost(folder: Path, straight: str) -> None:
    before = (folder / straight / "metrics.jsonl").read_text()
    ended = run(folder, straight)
    assert ended.codes == [2]
    assert "is not empty" in ended.text
    assert (folder / straight / "metrics.jsonl").read_text() == before


def test_a_damaged_checkpoint_is_named_and_passed_over(folder: Path, straight: str) -> None:
    shutil.copytree(folder / straight, folder / "damaged")
    weights = folder / "damaged" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    again = run_whole(folder, "damaged", "--resume=auto").text
    assert f"passed over a damaged checkpoint: step-{STEPS:08d}/model.safetensors: " in again
    assert f"resumed after step {STEPS - 10} " in again
    assert_same_run(folder, straight, "damaged")
