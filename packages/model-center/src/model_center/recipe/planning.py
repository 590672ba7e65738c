"""`model-center plan`: the memory that a pre-training run will need, before anything of it is allocated."""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from model_center.dataset.indexed.objectives import MaskedLM
from model_center.engine.optim.adam import BUCKET_ELEMENTS
from model_center.engine.run_ahead import blocks_ahead
from model_center.model import BaseModel, families
from model_center.model.config import Config
from model_center.tokenizer import load_tokenizer

from .commands import OK, preparing
from .configuration import nearest, require
from .pretrain_configuration import PretrainConfig, PretrainDataOptions, PretrainModelOptions
from .pretraining_objectives import PretrainingObjective, make_objective
from .progress import count
from .simulation import MicroBatch, StepMemory, blocks_of, meta_model, simulate

GIB = 2**30
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
WORKSPACE = 64 * 2**20
"""What matrix libraries hold for themselves, through PyTorch's allocator."""
CONTEXT = GIB // 2
"""What CUDA itself takes of a GPU, outside of PyTorch's allocator."""
FRAGMENTATION = 0.04
"""Share of a GPU's memory that is left free, because free pieces lie between used ones."""
PRECISIONS = {"half": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
UNTRAINED = "train:"
"""What the name of a tokenizer begins with that a run will train; its size follows."""
COMPILED = (
    "Blocks are to be compiled: they are planned as if they were not, and may need a tenth more or less. An "
    "engine.activation_budget is planned as the share that it says; compiled blocks often keep less."
)
MOST_ROWS = 4096
"""No larger micro-batch is looked for."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides how much memory a run needs."""

    engine: str = "torch"
    """torch or bmtrain."""
    world_size: int = 1
    recomputes: bool = True
    activation_budget: float | None = None
    """Share of their activations that compiled blocks keep, where they do not recompute all."""
    zero_level: Literal[2, 3] = 3
    offload: bool = False
    asynchronous_checkpoints: bool = False
    accumulates: bool = False
    """Whether a step has several micro-batches."""
    scales_loss: bool = False
    """Whether the loss is scaled, as with float16."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Memory of each GPU and, for its process, of the host; in bytes."""

    parameters: int
    optimizer: int
    """Masters and moments on the GPU."""
    gradients: int
    """All of them, as they are when a step's last backward is over."""
    activations: int
    """What forward keeps for backward."""
    moment: int
    """What forward, loss or backward need for a moment, at most."""
    gathered: int
    """Whole parameters and gradients of the blocks at work, where processes share them."""
    update: int
    """What clipping and the optimizer's step need for a moment."""
    computing: int
    """Peak in forward and backward, in which gradients come as activations go."""
    updating: int
    """Peak in the optimizer's step."""
    host_optimizer: int
    """Masters, moments and transfer buffers in the host's memory."""
    host_checkpoint: int
    """Copy of a checkpoint that is written while training goes on."""

    @property
    def peak(self) -> int:
        """Most that tensors take of a GPU at a time: what `torch.cuda.max_memory_allocated` will measure."""
        return max(self.computing, self.updating)

    @property
    def needed(self) -> int:
        """What a GPU must have: the peak, CUDA itself and what fragmentation wastes."""
        return round((self.peak + CONTEXT) / (1 - FRAGMENTATION))


@dataclass
class Planner:
    """Predicts the memory of one model for any setting and micro-batch.

    Args:
        model_class: the family.
        config: the model's configuration, whose `dtype` is a real type.
    """

    model_class: type[BaseModel]
    config: Config

    def __post_init__(self) -> None:
        self._simulated: dict[Any, StepMemory] = {}

    @cached_property
    def _models(self) -> dict[bool, BaseModel]:
        return {
            recomputes: meta_model(self.model_class, self.config, recomputes=recomputes) for recomputes in (False, True)
        }

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self._models[False].parameters())

    @cached_property
    def _block_sizes(self) -> list[int]:
        """Parameters of each block."""
        return [sum(weight.numel() for weight in block.parameters()) for block in blocks_of(self._models[False])]

    @cached_property
    def _largest_parameter(self) -> int:
        return max(parameter.numel() for parameter in self._models[False].parameters())

    def predict(self, setting: Setting, batch: MicroBatch, *, exact: bool = True) -> Prediction:
        """Predict the memory of one process.

        Args:
            setting: how the run trains.
            batch: what a process computes at once.
            exact: simulate this micro-batch; otherwise interpolate between a few that serve for all.
        """
        itemsize = self.config.dtype.itemsize
        in_blocks, largest = sum(self._block_sizes), max(self._block_sizes) * itemsize
        outside = self.parameters - in_blocks
        if setting.engine == "bmtrain":
            held = -(-self.parameters // setting.world_size)
        else:
            held = -(-in_blocks // setting.world_size) + outside
        states = held * state_bytes(self.config.dtype)
        step = self._step(setting, batch) if exact else self._interpolated_step(setting, batch)
        gradients = held * itemsize
        gathered = self._gathered(setting, largest, outside * itemsize, in_blocks * itemsize)
        earlier = gradients if setting.accumulates else 0
        on_gpu = held * itemsize + (0 if setting.offload else states)
        moment = (
            max(step.forward, step.loss, step.backward - (0 if setting.accumulates else step.gradients)) - step.kept
        )
        update = self._update(setting, held, outside * itemsize)
        return Prediction(
            parameters=held * itemsize,
            optimizer=0 if setting.offload else states,
            gradients=gradients,
            activations=step.kept,
            moment=max(0, moment),
            gathered=gathered,
            update=update,
            computing=on_gpu + earlier + max(step.forward, step.loss, step.backward) + gathered + WORKSPACE,
            updating=on_gpu + gradients + update + WORKSPACE,
            host_optimizer=states + held * itemsize if setting.offload else 0,
            host_checkpoint=held * itemsize + states if setting.asynchronous_checkpoints else 0,
        )

    def largest_rows(self, setting: Setting, batch: MicroBatch, memory: int) -> int:
        """Return the largest number of rows that fit into a GPU's memory (up to `MOST_ROWS`), 0 if not one does.

        Args:
            setting: how the run trains.
            batch: lengths of the rows.
            memory: bytes of the GPU.
        """

        def needed(rows: int) -> int:
            return self.predict(setting, replace(batch, rows=rows), exact=False).needed

        # Not straight into the middle, since the simulation of a micro-batch that is far too large takes long.
        limit = 1
        while limit < MOST_ROWS and needed(limit) <= memory:
            limit *= 2
        return bisect_right(range(1, limit + 1), memory, key=needed)

    def _step(self, setting: Setting, batch: MicroBatch) -> StepMemory:
        if setting.activation_budget is not None:
            # From what blocks keep that recompute all, to what they keep that recompute nothing.
            least, most = (
                self._step(replace(setting, recomputes=recomputes, activation_budget=None), batch)
                for recomputes in (True, False)
            )
            return _between(least, most, setting.activation_budget)
        key = (setting.recomputes, setting.world_size, setting.accumulates, batch)
        if key not in self._simulated:
            model = self._models[setting.recomputes]
            self._simulated[key] = simulate(model, batch, shards=setting.world_size, accumulates=setting.accumulates)
        return self._simulated[key]

    def _interpolated_step(self, setting: Setting, batch: MicroBatch) -> StepMemory:
        """Like `_step`, from the next smaller and larger powers of 4: memory grows on a line, or less and then more."""
        low = 4 ** ((batch.rows.bit_length() - 1) // 2)
        below, above = (self._step(setting, replace(batch, rows=rows)) for rows in (low, 4 * low))
        return _between(below, above, (batch.rows - low) / (3 * low))

    def _gathered(self, setting: Setting, largest_block: int, outside: int, blocks: int) -> int:
        if setting.engine == "torch" and setting.world_size == 1:
            return 0
        # The block at work, those on their way, and the gradients of as many that are being reduced.
        ahead = blocks_ahead(largest_block) if setting.engine == "bmtrain" else 1
        at_once = min(blocks, (1 + ahead) * largest_block)
        parameters = at_once if setting.zero_level == 3 else blocks
        gathered_outside = outside if setting.engine == "bmtrain" else 0
        return parameters + at_once + gathered_outside

    def _update(self, setting: Setting, held: int, outside: int) -> int:
        """Float32 gradients of a bucket of parameters, or the gradients that processes average at once."""
        bucket = min(held, max(BUCKET_ELEMENTS, self._largest_parameter))
        copies = (0 if self.config.dtype.itemsize >= 4 else 1) + setting.scales_loss
        averaged = outside if setting.engine == "torch" and setting.world_size > 1 else 0
        return max(0 if setting.offload else 4 * bucket * copies, averaged)


def _between(low: StepMemory, high: StepMemory, share: float) -> StepMemory:
    return StepMemory(**{name: round(size + share * (vars(high)[name] - size)) for name, size in vars(low).items()})


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
        scales_loss=config.model.precision == "half",
    )


def configured_model(options: PretrainModelOptions) -> tuple[type[BaseModel], Config]:
    """Return family and configuration of a model, with the types that it will have on a GPU.

    Raises:
        ValueError: there is no such directory or published size.
    """
    path = Path(options.name).expanduser()
    if path.is_dir():
        found = next(iter(_families_of(path)))
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


def _families_of(path: Path) -> Iterator[type[BaseModel]]:
    from model_center.model.source import read_config, resolve

    raw, file = read_config(resolve(path, {}))
    if raw.get("model_type") not in families:
        raise ValueError(f"{file}: `model_type` must be one of {', '.join(families)}, but is {raw.get('model_type')!r}")
    yield families[raw["model_type"]]


def state_bytes(dtype: torch.dtype) -> int:
    """Return what AdamW keeps for each weight of a type: two moments and, of half types, a master."""
    return 8 if dtype.itemsize >= 4 else 12


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
