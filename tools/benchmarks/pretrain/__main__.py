"""Runs the small pre-training presets from raw text to the plot, kills each at half time and goes on with it.

PYTHONPATH=tools python -m benchmarks.pretrain --folder runs/presets
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from model_center.recipe import read_metrics, read_status

from .baseline import frequency_baseline

PRESETS = ["gpt2-tiny-text", "bert-tiny-text", "t5-tiny-text"]
COMMAND = [sys.executable, "-m", "model_center.recipe", "pretrain"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folder", type=Path, required=True, help="new folder for runs and data")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--no_kill", action="store_true", help="let the runs go through")
    return parser


def run_preset(preset: str, seed: int, folder: Path, *, kill: bool) -> dict[str, Any]:
    """From raw text to the plot, in the seconds that both halves took together."""
    name = f"{preset}-{seed}"
    run = folder / name
    options = [
        "--preset",
        preset,
        "--seed",
        str(seed),
        "--output",
        str(run),
        "--data.path",
        str(folder / "data" / name),
    ]
    started = time.perf_counter()
    if kill:
        run_to_half(options, run)
        options = ["--config", str(run / "config.yaml"), "--resume", "auto"]
    subprocess.run([*COMMAND, *options], check=True)
    seconds = time.perf_counter() - started
    result = read_status(run)["result"]
    return {
        "preset": preset,
        "seed": seed,
        "steps": result["steps"],
        "loss": result["final_loss"],
        "baseline": frequency_baseline(run),
        "seconds": seconds,
        "plot": str(run / "plot.png"),
    }


def run_to_half(options: list[str], run: Path) -> None:
    """Kill the run when half of its steps are done.

    Raises:
        RuntimeError: it ended before that.
    """
    process = subprocess.Popen([*COMMAND, *options])
    while process.poll() is None and not is_half(run):
        time.sleep(1)
    process.kill()
    if process.wait() >= 0:
        raise RuntimeError(f"{run} ended by itself before half of its steps were done")


def is_half(run: Path) -> bool:
    if not (run / "metrics.jsonl").exists():
        return False
    steps = yaml.safe_load((run / "config.yaml").read_text())["max_steps"]
    return any(2 * record["step"] >= steps for record in read_metrics(run / "metrics.jsonl"))


def main() -> None:
    options, results = parser().parse_args(), []
    table = Table("preset", "seed", "steps", "by frequency alone", "validation loss", "seconds")
    for preset in options.presets:
        for seed in options.seeds:
            found = run_preset(preset, seed, options.folder.resolve(), kill=not options.no_kill)
            results.append(found)
            losses = [f"{found[name]:.3f}" for name in ("baseline", "loss")]
            table.add_row(preset, str(seed), str(found["steps"]), *losses, f"{found['seconds']:.0f}")
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
