"""Small models on a CPU: training steps and decoding, ours and Transformers' in turn, on the same weights."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..train_step.batches import Batch, make_batches
from ..train_step.trainees import Trainee, make_trainee
from ..train_step.workloads import Workload
from .inference import decode_ours, decode_theirs, fill_in_ours, fill_in_theirs, generate
from .workloads import WORKLOADS, settings

OURS, THEIRS = "ours", "Transformers"
SAME_LOSS = 1e-4
"""Largest relative difference of two losses that are called the same."""
BATCHES = 4


@dataclass
class Times:
    """What one side took: seconds of each round, and what its result was."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)


Outcome = tuple[str, dict[str, Times], bool]
"""What the work is called, each side's times, and whether all sides have the same results."""


def take_turns(work: Mapping[str, Callable[[int], Tensor]], rounds: int) -> dict[str, Times]:
    """Measures each side once a round, after two rounds that do not count; another side begins each time."""
    times = {name: Times() for name in work}
    names = list(work)
    for number in range(-2, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start, cpu_start = time.perf_counter(), time.process_time()
            result = work[name](number)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if number >= 0:
                times[name].seconds.append(seconds)
                times[name].cpu_seconds.append(cpu_seconds)
                times[name].results.append(result)
    return times


def make_sides(workload: Workload, compiled: bool) -> dict[str, Trainee]:
    """All sides, with the weights of ours."""
    sides = {name: make_trainee(workload, setting) for name, setting in settings(workload.family, compiled).items()}
    with tempfile.TemporaryDirectory() as folder:
        ours: Any = sides[OURS].module
        ours.export_huggingface(folder)
        for name, side in sides.items():
            if name != OURS:
                module: Any = side.module
                module.load_state_dict(type(module).from_pretrained(folder).state_dict())
    return sides


def run_models(workload: Workload, sides: Mapping[str, Trainee], batch: Batch, options: argparse.Namespace) -> Outcome:
    """Decoding, or filling in of masks where there is no decoder."""
    ours, theirs = (sides[name].module.eval() for name in (OURS, THEIRS))
    if workload.family == "bert":
        title, given = "fill in masks", (batch.ids, batch.labels != -100)
        functions = {OURS: partial(fill_in_ours, ours), THEIRS: partial(fill_in_theirs, theirs)}
    else:
        title, given = f"decode {options.tokens} tokens", (batch.ids, options.tokens)
        functions = {OURS: partial(decode_ours, ours), THEIRS: partial(decode_theirs, theirs)}
        functions[f"{THEIRS}, generate"] = partial(generate, theirs)

    def repeated(function: Callable[..., Tensor]) -> Callable[[int], Tensor]:
        return lambda _: function(*given)

    times = take_turns({name: repeated(function) for name, function in functions.items()}, options.rounds)
    return title, times, all(torch.equal(each.results[-1], times[OURS].results[-1]) for each in times.values())


def train_models(sides: Mapping[str, Trainee], batches: list[Batch], rounds: int) -> Outcome:
    """Training steps."""

    def steps(side: Trainee) -> Callable[[int], Tensor]:
        side.module.train()
        return lambda number: side.step(batches[number % len(batches)])

    times = take_turns({name: steps(side) for name, side in sides.items()}, rounds)
    losses = {name: torch.stack(each.results) for name, each in times.items()}
    return "training step", times, all(torch.allclose(each, losses[OURS], SAME_LOSS, 0) for each in losses.values())


def add_rows(table: Table, model: str, title: str, times: Mapping[str, Times]) -> None:
    """A row for each side."""
    ours = median(times[OURS].seconds)
    for name, each in times.items():
        middle, spread = median(each.seconds), max(each.seconds) - min(each.seconds)
        seconds = (f"{middle:.4f}", f"{spread / middle:.0%}", f"{median(each.cpu_seconds):.4f}")
        table.add_row(model, title, name, *seconds, f"{middle / ours:.2f}")
    table.add_section()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7, help="times that each side is measured")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also training steps of compiled Transformers")
    parser.add_argument("--batch", type=int, help="rows, instead of the workloads' own")
    parser.add_argument("--length", type=int, help="positions of a row, instead of the workloads' own")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the models, JSON")
    return parser


def main() -> int:
    """Returns 1 if two sides differ in their losses or tokens."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options, console = parser().parse_args(), Console(width=120)
    torch.set_num_threads(options.threads)
    table = Table(title=f"{options.threads} threads, {options.rounds} rounds, float32", title_justify="left")
    for heading in ("model", "work", "side", "s (median)", "spread", "CPU s", "times ours"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("model", "work", "side") else "right")
    differing = []
    for name in options.models:
        workload: Workload = WORKLOADS[name]
        changes = {key: value for key in ("batch", "length") if (value := getattr(options, key))}
        workload = replace(workload, **changes, options={**workload.options, **options.options})
        sides = make_sides(workload, options.compiled)
        batches = make_batches(workload, sides[OURS].config.vocab_size, BATCHES, seed=0)
        for title, times, agree in (
            run_models(workload, sides, batches[0], options),
            train_models(sides, batches, options.rounds),
        ):
            add_rows(table, name, title, times)
            if not agree:
                differing.append(f"{name}, {title}")
    console.print(table)
    console.print(f"Results differ: {'; '.join(differing)}" if differing else "All sides agree on losses and tokens.")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
