"""Fine-tunes MiniLM on tasks of SuperGLUE, by our recipe and by Transformers, with the same seeds and batches.

PYTHONPATH=tools python -m benchmarks.finetune --data SUPERGLUE
"""

import argparse
import json
import platform
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model_center.recipe import DataOptions, FinetuneConfig, ModelOptions, OptimizerOptions
from model_center.recipe.quickstart import minilm_path

from .training import Outcome, train_ours, train_theirs, without_dropout

EPOCHS = {"CB": 5, "RTE": 3}
CURVE_STEPS = 20
SIDES = {"ours": train_ours, "Transformers": train_theirs}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of SuperGLUE's tasks")
    parser.add_argument("--tasks", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help=f"instead of {EPOCHS}")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


def configuration(options: argparse.Namespace, task: str, seed: int, folder: Path) -> FinetuneConfig:
    return FinetuneConfig(
        output=str(folder / "run"),
        seed=seed,
        epochs=options.epochs or EPOCHS[task],
        model=ModelOptions(name=str(minilm_path()), precision="fp32"),
        data=DataOptions(path=str(options.data), task=task, max_length=128, batch_size=16),
        optimizer=OptimizerOptions(learning_rate=1e-4),
    )


def curve_difference(config: FinetuneConfig, folder: Path) -> dict[str, float]:
    """Largest difference of the losses of the first steps without dropout, and how far the losses fall meanwhile."""
    config = replace(without_dropout(config, folder), max_steps=CURVE_STEPS)
    ours, theirs = (train(config).losses for train in SIDES.values())
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    return {"largest_difference": max(differences), "first_loss": theirs[0], "last_loss": theirs[-1]}


def main() -> None:
    options, console = parser().parse_args(), Console()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers", "model-center")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "tasks": {},
    }
    table = Table("task", "majority", *SIDES, "largest difference of losses")
    with tempfile.TemporaryDirectory() as folder:
        for task in options.tasks:
            outcomes: dict[str, list[Outcome]] = {side: [] for side in SIDES}
            configs = [configuration(options, task, seed, Path(folder)) for seed in options.seeds]
            for config in configs:
                for side, train in SIDES.items():
                    outcomes[side].append(train(config))
                    console.print(f"{task}, seed {config.seed}, {side}: {outcomes[side][-1].accuracy:.1%}")
            curve = curve_difference(configs[0], Path(folder) / f"without-dropout-{task}")
            results["tasks"][task] = {
                "seeds": options.seeds,
                "without_dropout": curve,
                "outcomes": {side: [asdict(each) for each in found] for side, found in outcomes.items()},
            }
            cells = [_with_spread([each.accuracy for each in found]) for found in outcomes.values()]
            majority = outcomes["ours"][0].majority
            table.add_row(task, f"{majority:.1%}", *cells, f"{curve['largest_difference']:.1e}")
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    console.print(table)


def _with_spread(values: list[float]) -> str:
    spread = f" ± {stdev(values):.1%}" if len(values) > 1 else ""
    return f"{mean(values):.1%}{spread} ({', '.join(f'{value:.1%}' for value in values)})"


if __name__ == "__main__":
    main()
