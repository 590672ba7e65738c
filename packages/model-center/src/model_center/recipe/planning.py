"""`model-center plan`: the memory that a pre-training run will need, and what would fit into a GPU's."""

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from model_center.dataset.indexed.objectives import MaskedLM
from model_center.model import BaseModel, families
from model_center.model.config import Config
from model_center.model.families import find_family
from model_center.tokenizer import load_tokenizer

from .commands import OK, preparing
from .configuration import nearest, require
from .memory_prediction import GIB, Planner, Prediction, Setting
from .pretrain_configuration import PretrainConfig, PretrainDataOptions, PretrainModelOptions
from .pretraining_objectives import PretrainingObjective, make_objective
from .progress import count
from .simulation import MicroBatch

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
PRECISIONS = {"half": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
UNTRAINED = "train:"
"""What the name of a tokenizer begins with that a run will train; its size follows."""
COMPILED = (
    "Blocks are to be compiled: they are planned as if they were not, and may need a tenth more or less. An "
    "engine.activation_budget is planned as the share that it says; compiled blocks often keep less."
)


def run(config: PretrainConfig, console: Console, *, memory: str | None, world_size: int) -> int:
    """Print what a configuration needs, and what would fit into the given memory."""
    with preparing(console, "Planning"):
        require(world_size > 0, "world_size", "positive", world_size)
        limit = gpu_memory() if memory is None else parse_memory(memory)
        planner = Planner(*configured_model(config.model))
        tokenizer = planned_tokenizer(config.data)
        objective = make_objective(planner.config, tokenizer, config.data.objective_options)
        batch = micro_batch(objective, config.batch.micro_size)
        setting = setting_of(config, world_size)
        prediction = planner.predict(setting, batch)
        options = list(proposals(planner, setting, batch, limit)) if limit is not None else []
    name = f"{config.model.name}, {count(planner.parameters)} parameters"
    lengths = " and ".join(str(length) for length in (batch.length, batch.decoder_length) if length)
    console.print(
        f"{name}; micro-batch of {batch.rows} rows of {lengths} tokens; {world_size} GPU{'s' * (world_size > 1)}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(prediction_table(prediction))
    if limit is not None:
        console.print(proposal_table(options, setting, limit))
    if config.engine.compile:
        console.print(COMPILED, highlight=False, soft_wrap=True)
    return OK


def setting_of(config: PretrainConfig, world_size: int, engine: str | None = None) -> Setting:
    """Return what a configuration sets, in so many processes on GPUs; the engine is the configured one by default."""
    checkpointing, budget = config.engine.use_checkpoint, config.engine.activation_budget
    return Setting(
        engine=engine or config.engine.name or "torch",
        world_size=world_size,
        recomputes=budget is None if checkpointing is None else checkpointing,
        activation_budget=budget,
        zero_level=config.engine.zero_level,
        offload=config.optimizer.offload,
        asynchronous_checkpoints=config.checkpoints.asynchronous,
        accumulates=config.batch.global_size > config.batch.micro_size * world_size,
    )


def configured_model(options: PretrainModelOptions) -> tuple[type[BaseModel], Config]:
    """Return family and configuration of a model, with the types that it will have on a GPU.

    Raises:
        ValueError: there is no such directory or published size.
    """
    path = Path(options.name).expanduser()
    if path.is_dir():
        found = find_family(path)
        config = found.config_class.from_pretrained(path)
    else:
        published = {name: family for family in families.values() for name in family.config_class.published}
        if options.name not in published:
            raise ValueError(
                f"model.name must be a directory or a published size, but is {options.name!r}"
                + nearest(options.name, published)
            )
        found = published[options.name]
        config = found.config_class.preset(options.name)
    changes = {**options.options, "dtype": str(PRECISIONS[options.precision]).removeprefix("torch.")}
    values = {name: value for name, value in config.to_dict().items() if name in {each.name for each in fields(config)}}
    return found, found.config_class.from_dict({**values, **changes}, "model.options")


def micro_batch(objective: PretrainingObjective, rows: int) -> MicroBatch:
    """Return the size of a full micro-batch of so many rows."""
    length, decoder_length = (*objective.sides, 0)[:2]
    share = objective.inner.share if isinstance(objective.inner, MaskedLM) else 1.0
    return MicroBatch(rows=rows, length=length, decoder_length=decoder_length, targets=share)


def planned_tokenizer(options: PretrainDataOptions) -> Any:
    """Return the tokenizer of a run, or what stands for it until the run has trained it."""
    if not options.tokenizer.startswith(UNTRAINED):
        return load_tokenizer(options.tokenizer)
    size = options.tokenizer.removeprefix(UNTRAINED)
    require(size.isdecimal(), "data.tokenizer", "of the form train:SIZE, e.g. train:4000", options.tokenizer)
    return UntrainedTokenizer(int(size))


class UntrainedTokenizer:
    """Has the size and the special tokens of a tokenizer that is still to be trained, and encodes nothing."""

    eod_id = pad_id = 0
    fingerprint = ""

    def __init__(self, size: int) -> None:
        self.vocab_size, self.name = size, f"{UNTRAINED}{size}"

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return what objectives look for in a vocabulary."""
        tokens = ["[CLS]", "[SEP]", "[MASK]", "##", *(f"<extra_id_{number}>" for number in range(100))]
        return {token: number for number, token in enumerate(tokens)}


def proposals(
    planner: Planner, setting: Setting, batch: MicroBatch, memory: int
) -> Iterator[tuple[Setting, int, Prediction]]:
    """Yield settings from the fastest to the most frugal, their largest micro-batch and what that needs."""
    levels: tuple[Literal[2, 3], ...] = (2, 3) if setting.world_size > 1 else (setting.zero_level,)
    budget = setting.activation_budget
    keeping = [(False, None), *([] if budget is None else [(False, budget)]), (True, None)]
    for offload, (recomputes, share), level in product((False, True), keeping, levels):
        changed = replace(setting, recomputes=recomputes, activation_budget=share, zero_level=level, offload=offload)
        rows = planner.largest_rows(changed, batch, memory)
        yield changed, rows, planner.predict(changed, replace(batch, rows=max(1, rows)))


def prediction_table(prediction: Prediction) -> Table:
    """Return a prediction as a table, in GiB."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("per GPU", style="bold")
    table.add_column("GiB", justify="right")
    rows = {
        "parameters": prediction.parameters,
        "gradients": prediction.gradients,
        "optimizer states": prediction.optimizer,
        "activations kept for backward": prediction.activations,
        "for a moment in forward, loss or backward": prediction.moment,
        "gathered blocks and their gradients": prediction.gathered,
        "for a moment in the update": prediction.update,
        "peak of forward and backward": prediction.computing,
        "peak of the update": prediction.updating,
        "GPU memory needed, with CUDA and fragmentation": prediction.needed,
        "host: optimizer states and buffers": prediction.host_optimizer,
        "host: copy of a checkpoint": prediction.host_checkpoint,
    }
    for name, size in rows.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    return table


def proposal_table(options: list[tuple[Setting, int, Prediction]], wanted: Setting, memory: int) -> Table:
    """Return what fits into the memory, from the fastest setting to the most frugal one; the configured one is bold.

    `recomputes` is the option engine.use_checkpoint, or engine.activation_budget where there is one, `ZeRO`
    engine.zero_level, and `offload` optimizer.offload.
    """
    table = Table(title=f"What fits into {memory / GIB:.1f} GiB", show_edge=False, pad_edge=False)
    for name in ("recomputes", "ZeRO", "offload", "largest micro-batch", "GiB"):
        table.add_column(name, justify="right")
    for setting, rows, prediction in options:
        budget = setting.activation_budget
        recomputes = _yes(setting.recomputes) if budget is None else f"beyond {budget:.0%}"
        cells = (recomputes, str(setting.zero_level), _yes(setting.offload))
        size = f"{rows:,}" if rows else "does not fit"
        style = "bold" if setting == wanted else None
        table.add_row(*cells, size, f"{prediction.needed / GIB:.2f}", style=style)
    return table


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def gpu_memory() -> int | None:
    """Return the memory of this machine's first GPU in bytes, None if there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as `80GiB`, `80G` or `500MB` (all counted in powers of 1024).

    Raises:
        ValueError: it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip())
    size = float(found[1]) * UNITS[found[2]] if found else inf
    require(found is not None and size >= 1, "memory", "a size such as 80GiB", text)
    return int(size)
