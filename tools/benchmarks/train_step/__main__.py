"""Measures training steps of our models and of Transformers' in alternating turns.

    PYTHONPATH=tools python -m benchmarks.train_step --workload bert-large --json bert-large.json

Each setting runs in processes of its own. They set up (and compile) together and then take turns, one at a time; with
`--apart` each is started anew for every turn, for models of which several do not fit on the GPU.
"""

import argparse
import json
import platform
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .floors import floor_of, floor_table
from .processes import WorkerError, WorkerProcess
from .reports import Row, profile_tables, row_of, table_of
from .workloads import SETTINGS, WORKLOADS, Workload, settings_of

REFERENCE = "ours-fp32"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="bert-large")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument(
        "--activation_budget", type=float, nargs="+", default=[], metavar="SHARE", help="of settings that have one"
    )
    parser.add_argument("--batch", type=int, help="rows of a step of one process")
    parser.add_argument("--length", type=int, help="positions of a row")
    parser.add_argument("--target_length", type=int, help="positions of the decoder")
    parser.add_argument("--padding", type=float, help="share of padding, from 0 to 0.5")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the model, JSON")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cap_gib", type=float, help="most memory that a process may take on its GPU")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--apart", action="store_true", help="start each setting anew for every turn")
    parser.add_argument("--limit_s", type=float, default=240, help="longest wait for an answer of a setting")
    parser.add_argument("--profile", action="store_true", help="show the kernels of the first setting's step")
    parser.add_argument("--floor", action="store_true", help="show what a step needs at least on this device")
    parser.add_argument("--find_largest_batch", action="store_true", help="of each setting, under --cap_gib")
    parser.add_argument("--granularity", type=int, default=8, help="of the largest batch")
    parser.add_argument("--loss_curve", type=int, metavar="STEPS", help=f"compare losses with those of {REFERENCE}")
    parser.add_argument(
        "--deterministic", type=int, metavar="STEPS", help="compare two runs of each setting bit by bit"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


class Benchmark:
    """What the command line asks for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console(width=160)
        workload = WORKLOADS[options.workload]
        given = {name: getattr(options, name) for name in ("batch", "length", "target_length", "padding")}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.workload = replace(workload, **changes, options={**workload.options, **options.options})
        self.settings = settings_of(options.settings or workload.settings, options.activation_budget)
        self.names = list(self.settings)
        self.failures: dict[str, str] = {}
        self.results: dict[str, Any] = {}

    def start(self, name: str, workload: Workload | None = None) -> WorkerProcess:
        options = self.options
        limits = {"cap_gib": options.cap_gib, "limit_s": options.limit_s}
        setting = self.settings.get(name) or SETTINGS[name]
        return WorkerProcess(workload or self.workload, setting, processes=options.processes, **limits)

    def failed(self, name: str, error: WorkerError) -> None:
        self.failures[name] = str(error)
        self.console.print(f"{name}: {error}", markup=False)

    def compare_speed(self) -> list[Row]:
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in self.names}
        with ExitStack() as stack:
            workers = {} if self.options.apart else {name: stack.enter_context(self.start(name)) for name in self.names}
            for worker_name, worker in workers.items():  # none is timed while another one compiles
                try:
                    worker.wait_until_ready()
                except WorkerError as error:
                    self.failed(worker_name, error)
            for turn in range(self.options.turns):
                for name in [name for name in self.names if name not in self.failures]:
                    try:
                        turns[name].append(self._turn(name, workers.get(name), turn))
                    except WorkerError as error:
                        self.failed(name, error)
                    else:
                        row = row_of(name, turns[name][-1:])
                        memory = "" if row.peak_gib is None else f", {row.peak_gib:.1f} GiB"
                        self.console.print(f"turn {turn}: {name}: {row.samples_per_second:.2f} samples/s{memory}")
        self.results["turns"] = turns
        rows = [row_of(name, of_setting) for name, of_setting in turns.items() if of_setting]
        self.results["rows"] = [{**asdict(row), "roofline_share": row.roofline_share} for row in rows]
        return rows

    def _turn(self, name: str, worker: WorkerProcess | None, turn: int) -> dict[str, Any]:
        if worker is None:
            with self.start(name) as own:
                return self._measure(own, name, turn)
        return self._measure(worker, name, turn)

    def _measure(self, worker: WorkerProcess, name: str, turn: int) -> dict[str, Any]:
        measured = worker.ask(f"measure {self.options.steps}")
        if self.options.profile and turn == 0 and name == self.names[0]:
            profile = worker.ask("profile")
            self.results["profile"] = profile
            for table in profile_tables(name, profile):
                self.console.print(table)
        return measured

    def find_largest_batches(self) -> list[Row]:
        """Doubles the batch until it no longer fits, halves the gap until it is the granularity, and measures that."""
        rows = []
        for name in self.names:
            step = self.options.granularity
            fits, too_large, best = 0, None, None
            while too_large is None or too_large - fits > step:
                size = max(step, 2 * fits) if too_large is None else (fits + too_large) // 2 // step * step
                try:
                    with self.start(name, replace(self.workload, batch=size)) as worker:
                        measured = worker.ask(f"measure {self.options.steps}")
                except WorkerError as error:
                    self.console.print(f"{name}: batch {size}: {error}", markup=False)
                    if "OutOfMemory" not in str(error):
                        self.failed(name, error)
                        break
                    too_large = size
                else:
                    fits, best = size, row_of(f"{name}, batch {size}", [measured])
                    self.console.print(f"{name}: batch {size}: {best.samples_per_second:.1f} samples/s")
            if best is not None:
                rows.append(best)
        self.results["rows"] = [asdict(row) for row in rows]
        return rows

    def compare_losses(self) -> None:
        """All start from the reference's weights and see the same batches."""
        curves: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.pt"
            for name in [REFERENCE, *(name for name in self.names if name != REFERENCE)]:
                try:
                    with self.start(name) as worker:
                        worker.ask(f"load {weights}" if weights.exists() else f"save {weights}")
                        curves[name] = worker.ask(f"losses {self.options.loss_curve}")["losses"]
                except WorkerError as error:
                    self.failed(name, error)
        self.results["losses"] = curves
        expected = curves.get(REFERENCE, [])
        for name, losses in curves.items():
            furthest = max((abs(one - two) / two for one, two in zip(losses, expected, strict=False)), default=0.0)
            self.console.print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}, at most {furthest:.2e} from {REFERENCE}")

    def compare_bits(self) -> None:
        """Two runs of each setting."""
        self.results["bits"] = {}
        for name in self.names:
            runs = []
            try:
                for _ in range(2):
                    with self.start(name) as worker:
                        runs.append(worker.ask(f"losses {self.options.deterministic}"))
            except WorkerError as error:
                self.failed(name, error)
                continue
            same = runs[0]["weights"] == runs[1]["weights"] and runs[0]["losses"] == runs[1]["losses"]
            self.results["bits"][name] = same
            self.console.print(f"{name}: weights and losses of two runs are {'the same' if same else 'DIFFERENT'}")

    def run(self) -> int:
        options, rows = self.options, []
        if options.floor:
            floor = floor_of(self.workload)
            self.results["floor"] = floor.report()
            self.console.print(floor_table(options.workload, floor))
        elif options.loss_curve:
            self.compare_losses()
        elif options.deterministic:
            self.compare_bits()
        else:
            rows = self.find_largest_batches() if options.find_largest_batch else self.compare_speed()
            title = f"{options.workload}, batch {self.workload.batch} ({self.workload.target or 'no target'})"
            self.console.print(table_of(title, rows))
        for name, reason in self.failures.items():
            self.console.print(f"{name} failed: {reason}", markup=False)
        self.results |= {
            "command": sys.argv[1:],
            "workload": asdict(self.workload),
            "failures": self.failures,
            "machine": machine(),
        }
        if options.json:
            options.json.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        return 1 if self.failures else 0


def machine() -> dict[str, Any]:
    """What it ran on."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here, check=False)
    return {"gpus": gpus, "versions": versions, "commit": commit.stdout.strip() or None}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))  # so that workers end, too
    raise SystemExit(Benchmark(parser().parse_args()).run())
