"""What `model-center plan` predicts of a training step's memory, beside the measured peak. Needs a CUDA device.

PYTHONPATH=tools python -m benchmarks.plan --engine torch
"""

import argparse
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from model_center import engine
from model_center.model import families
from model_center.recipe.memory_prediction import Planner, Setting
from model_center.recipe.simulation import MicroBatch

GIB = 2**30
PREDICTED = 1 / 7
"""Share of the positions that the masked language model predicts."""


@dataclass(frozen=True)
class Case:
    """A model and the micro-batch of a step."""

    family: str
    preset: str
    length: int
    rows: int
    recomputes: bool


# Rows with activations kept, and with activations recomputed.
SIZES = [
    ("bert", "bert-large-uncased", 512, (16, 64), (16, 64)),
    ("gpt2", "gpt2-xl", 1024, (4, 12), (4, 16)),
    ("t5", "t5-3b", 512, (4, 12), (4, 16)),
]
CASES = [
    Case(family, preset, length, rows, recomputes)
    for family, preset, length, *both in SIZES
    for recomputes, sizes in zip((False, True), both, strict=True)
    for rows in sizes
]


def main() -> None:
    """Train two steps of each case and print both peaks."""
    parser = argparse.ArgumentParser(prog="plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("torch", "bmtrain"), default="torch")
    name: Literal["torch", "bmtrain"] = parser.parse_args().engine
    engine.init_distributed(seed=0, engine=name, use_checkpoint=True)
    table = Table(
        "model", "rows", "activations", "peak, GiB", "predicted", "difference", title=f"{name}, one process, bf16"
    )
    for case, (measured, predicted) in zip(CASES, peaks(name), strict=True):
        kept = "recomputed" if case.recomputes else "kept"
        numbers = f"{measured / GIB:.2f}", f"{predicted / GIB:.2f}", f"{predicted / measured - 1:+.1%}"
        table.add_row(f"{case.preset}, {case.length}", str(case.rows), kept, *numbers)
    Console(width=100).print(table)


def peaks(name: Literal["torch", "bmtrain"]) -> Iterator[tuple[int, int]]:
    """Yield measured and predicted bytes of each case."""
    for case in CASES:
        model_class = families[case.family]
        config: Any = model_class.config_class.preset(case.preset)
        config.dtype = torch.bfloat16
        labels = torch.randint(5, 20000, (case.rows, case.length))
        if case.family == "bert":
            labels[:, torch.arange(case.length) % round(1 / PREDICTED) != 1] = -100
        measured = measure(model_class, config, case, labels)
        gc.collect()
        torch.cuda.empty_cache()
        targets = (labels != -100).float().mean().item()
        decoder_length = case.length if case.family == "t5" else 0
        batch = MicroBatch(rows=case.rows, length=case.length, decoder_length=decoder_length, targets=targets)
        planned = Planner(model_class, config).predict(Setting(engine=name, recomputes=case.recomputes), batch)
        yield measured, planned.peak


def measure(model_class: Any, config: Any, case: Case, labels: torch.Tensor) -> int:
    """Return the most bytes that tensors took in the second training step."""
    engine.current_engine().use_checkpoint = case.recomputes
    before = torch.cuda.memory_allocated()
    model = model_class(config).train()
    optimizer = engine.optim.AdamOptimizer(model.parameters(), lr=1e-4)
    manager = engine.optim.OptimManager()
    manager.add_optimizer(optimizer)
    inputs = {"input_ids": labels.clamp(min=5).cuda()}
    if case.family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    for _ in range(2):
        manager.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        hidden_states = model(**inputs).last_hidden_state
        loss = model.summed_loss(hidden_states, labels) / (labels != -100).sum()
        del hidden_states
        manager.backward(loss)
        manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        manager.step()
        torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


if __name__ == "__main__":
    main()
