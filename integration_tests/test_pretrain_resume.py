"""A pre-training run that is killed, or asked to stop, goes on as if nothing had happened, on any number of processes.

Most runs are of processes forked from one that has imported everything; the killed one starts the command itself.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_training import exit_codes, start_processes
from safetensors.torch import load_file

from model_center.recipe.cli import main
from model_center.recipe.pretraining_data import PretrainingData, StepBatches

STEPS = 200
GLOBAL_SIZE = 8
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
batch: {{global_size: {GLOBAL_SIZE}, micro_size: 4}}
optimizer: {{learning_rate: 1e-2, warmup_steps: 2}}
checkpoints: {{every_steps: 10, every_minutes: null}}
validation: {{every_steps: 50}}
"""
WORDS = ["the", "old", "king", "walked", "to", "a", "river", "and", "sang", "of", "winter", "light"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    write_inputs(folder)
    return folder


def write_inputs(folder: Path) -> None:
    """A configuration and a text."""
    lines = [" ".join(WORDS[(line * place) % 12] for place in range(1, 10 + line % 7)) for line in range(120)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "run.yaml").write_text(OPTIONS)


def words(folder: Path, output: str, *options: str) -> list[str]:
    data = [f"--data.path={folder / 'data'}", f"--data.text={folder / 'text.txt'}"]
    output_options = [f"--output={folder / output}", "--log_every=1"]
    return ["pretrain", f"--config={folder / 'run.yaml'}", *data, *output_options, *options]


def pretrain(log: Path, stop: int | None, signalled: int, arguments: list[str]) -> None:
    """Run the command in this process.

    Args:
        log: start of the names of the files for what is printed and for the samples of each step.
        stop: before this step, counted from 0, a signal comes to the first process; None for no signal.
        signalled: number of the signal.
        arguments: of the command.
    """
    prepare, rank = PretrainingData.step, os.environ["RANK"]

    def recorded(data: PretrainingData, number: int) -> StepBatches:
        if number == stop and rank == "0":
            os.kill(os.getpid(), signalled)
        batches = prepare(data, number)
        with Path(f"{log}.{rank}.samples").open("a") as file:
            file.write(json.dumps([number, batches.samples]) + "\n")
        return batches

    PretrainingData.step = recorded  # type: ignore[method-assign, assignment] # this process does nothing else
    with Path(f"{log}.{rank}").open("w") as text, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        raise SystemExit(main(arguments))


@dataclass(frozen=True)
class Ended:
    """A run, or a part of it, that has come to its end.

    Attributes:
        codes: The exit code of each process.
        text: What the first one has printed.
        samples: The samples of each step, of all processes.
    """

    codes: list[int | None]
    text: str
    samples: dict[int, list[int]]


def run(
    folder: Path, output: str, *options: str, processes: int = 1, stop: int | None = None, number: int = 0
) -> Ended:
    """Run the command in forked processes, which a signal to the first one may end."""
    log = folder / f"{output}.{len(list(folder.glob(f'{output}.*.0')))}"
    arguments = words(folder, output, *options)
    launched = start_processes(pretrain, processes, log, stop, number, arguments)
    if number == signal.SIGKILL:
        launched[0].join()
        for process in launched[1:]:
            process.kill()
    codes = exit_codes(launched)
    samples: dict[int, list[int]] = {}
    for path in folder.glob(f"{log.name}.*.samples"):
        for line in path.read_text().splitlines():
            step, numbers = json.loads(line)
            samples.setdefault(step, []).extend(numbers)
    text = Path(f"{log}.0").read_text()
    assert codes[0] is not None, text
    return Ended(codes, text, {step: sorted(numbers) for step, numbers in samples.items()})


def run_whole(folder: Path, output: str, *options: str, processes: int = 1) -> Ended:
    ended = run(folder, output, *options, processes=processes)
    assert ended.codes == [0] * processes, ended.text
    assert state(folder, output) == "finished"
    return ended


def state(folder: Path, output: str) -> str:
    return str(json.loads((folder / output / "status.json").read_text())["state"])


def losses(folder: Path, output: str) -> list[tuple[str, int, float]]:
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()
    ]
    return [(record["kind"], record["step"], record["loss"]) for record in records]


@pytest.fixture(scope="module")
def straight(folder: Path) -> str:
    """A run without interruption."""
    assert "validation    loss" in run_whole(folder, "straight").text
    return "straight"


def assert_same_run(folder: Path, first: str, second: str, steps: int = STEPS) -> None:
    """Losses, weights, optimizer and random generators, bit by bit."""
    assert losses(folder, first) == losses(folder, second)
    ends = [folder / name / "checkpoints" / f"step-{steps:08d}" for name in (first, second)]
    expected, found = (sorted(path.name for path in end.glob("*.safetensors")) for end in ends)
    assert expected == found
    for file in expected:
        tensors, again = (load_file(end / file) for end in ends)
        assert tensors.keys() == again.keys()
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, again[name])] == []


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
    """From one to two, four and one again; without dropout, of which every process draws its own."""
    options = ("--max_steps=12", "--validation.every_steps=3", "--model.options.dropout_p=0.0", "--resume=auto")
    expected = run_whole(folder, "alone", *options).samples
    found: dict[int, list[int]] = {}
    for processes, stop in [(1, 2), (2, 5), (4, 8)]:
        part = run(folder, "resharded", *options, processes=processes, stop=stop, number=signal.SIGTERM)
        assert part.codes == [130] * processes, part.text
        found |= part.samples
    last = run_whole(folder, "resharded", *options)
    assert "resumed after step 9 " in last.text
    found |= last.samples
    assert found == expected
    assert [len(set(numbers)) for numbers in found.values()] == [GLOBAL_SIZE] * 12
    alone, resharded = losses(folder, "alone"), losses(folder, "resharded")
    assert [record[:2] for record in alone] == [record[:2] for record in resharded]
    assert [record[2] for record in resharded] == pytest.approx([record[2] for record in alone], abs=1e-4)


def test_a_signal_saves_and_ends(folder: Path, straight: str) -> None:
    option = "--checkpoints.asynchronous=false"
    ended = run(folder, "stopped", option, stop=4, number=signal.SIGTERM)
    assert ended.codes == [130]
    assert "interrupted after step 5, which was saved; --resume auto goes on from there" in ended.text
    assert state(folder, "stopped") == "interrupted"
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
