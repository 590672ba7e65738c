"""The memory that a training step of a model needs on a GPU, from its simulation and from who holds what."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from model_center.engine.run_ahead import blocks_ahead
from model_center.model import BaseModel
from model_center.model.config import Config

from .simulation import MicroBatch, StepMemory, blocks_of, meta_model, simulate

GIB = 2**30
WORKSPACE = 64 * 2**20
"""What matrix libraries hold for themselves, through PyTorch's allocator."""
CONTEXT = GIB // 2
"""What CUDA itself takes of a GPU, outside of PyTorch's allocator."""
FRAGMENTATION = 0.04
"""Share of a GPU's memory that is left free, because free pieces lie between used ones."""
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
    """What averaging gradients before the optimizer's step needs for a moment."""
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

    GPUs are taken to run the optimizer's Triton kernels, as NVIDIA's do from compute capability 8.0 on. Others clip and
    update half-precision parameters by way of float32 gradients, whose memory is not counted.

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
        saved = held * saved_state_bytes(self.config.dtype)
        states = saved if setting.offload else held * state_bytes(self.config.dtype)
        step = self._step(setting, batch) if exact else self._interpolated_step(setting, batch)
        gradients = held * itemsize
        gathered = self._gathered(setting, largest, outside * itemsize, in_blocks * itemsize)
        earlier = gradients if setting.accumulates else 0
        on_gpu = held * itemsize + (0 if setting.offload else states)
        moment = (
            max(step.forward, step.loss, step.backward - (0 if setting.accumulates else step.gradients)) - step.kept
        )
        update = self._update(setting, outside * itemsize)
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
            host_checkpoint=held * itemsize + saved if setting.asynchronous_checkpoints else 0,
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
        # What BMTrain's blocks keep for backward includes their gathered parameters.
        released = setting.zero_level == 3 and (setting.engine == "torch" or setting.recomputes)
        parameters = at_once if released else blocks
        gathered_outside = outside if setting.engine == "bmtrain" else 0
        return parameters + at_once + gathered_outside

    def _update(self, setting: Setting, outside: int) -> int:
        """The gradients that processes average at once; kernels update parameters without any float32 gradients."""
        return outside if setting.engine == "torch" and setting.world_size > 1 else 0


def _between(low: StepMemory, high: StepMemory, share: float) -> StepMemory:
    return StepMemory(**{name: round(size + share * (vars(high)[name] - size)) for name, size in vars(low).items()})


def state_bytes(dtype: torch.dtype) -> int:
    """Return what AdamW keeps beside each weight of a type: two moments and, of half types, what makes a master."""
    return 10 if dtype is torch.bfloat16 else saved_state_bytes(dtype)


def saved_state_bytes(dtype: torch.dtype) -> int:
    """Return what it saves, or keeps on the host, for each weight: two moments and, of half types, a master."""
    return 8 if dtype.itemsize >= 4 else 12
