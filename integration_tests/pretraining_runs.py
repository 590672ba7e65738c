"""Runs of `model-center pretrain` in processes that a launcher might have started, some of which are killed.

They are forked from a process that has imported everything. They train on the GPUs where there are some.
"""

import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_training import exit_codes, start_processes
from safetensors.torch import load_file
from shared_gpus import take_place

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
RESHARDED = ("--max_steps=12", "--validation.every_steps=3", "--model.options.dropout_p=0.0", "--resume=auto")
"""For runs on different numbers of processes; without dropout, of which every process draws its own."""
WORDS = ["the", "old", "king", "walked", "to", "a", "river", "and", "sang", "of", "winter", "light"]


def write_inputs(folder: Path) -> Path:
    """A configuration and a text, in a folder that is returned."""
    lines = [" ".join(WORDS[(line * place) % 12] for place in range(1, 10 + line % 7)) for line in range(120)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "run.yaml").write_text(OPTIONS)
    return folder


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
    take_place()
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


def assert_resharded(folder: Path, straight: str, output: str, expected: Ended, engines: Sequence[str]) -> None:
    """From one process to two, four and one again, a run trains like one on the same process throughout.

    Args:
        folder: where the runs are.
        straight: run on one process, with `RESHARDED`.
        output: run in four parts, each resumed from the one before.
        expected: how the straight one ended.
        engines: of each part.
    """
    found: dict[int, list[int]] = {}
    text = ""
    for engine, processes, stop in zip(engines, (1, 2, 4, 1), (2, 5, 8, None), strict=True):
        options = (*RESHARDED, f"--engine.name={engine}")
        part = run(folder, output, *options, processes=processes, stop=stop, number=signal.SIGTERM)
        assert part.codes == [0 if stop is None else 130] * processes, part.text
        found |= part.samples
        text = part.text
    assert "resumed after step 9 " in text
    assert state(folder, output) == "finished"
    assert found == expected.samples
    assert [len(set(numbers)) for numbers in found.values()] == [GLOBAL_SIZE] * 12
    alone, resharded = losses(folder, straight), losses(folder, output)
    assert [record[:2] for record in alone] == [record[:2] for record in resharded]
    assert [record[2] for record in resharded] == pytest.approx([record[2] for record in alone], abs=1e-4)
