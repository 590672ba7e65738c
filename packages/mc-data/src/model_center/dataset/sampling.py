"""Which rows a process reads, in which order, and where it stands: plain arithmetic, without PyTorch.

The steps of an epoch cut one order of all rows into pieces of `batch_size` × `world_size`; of each piece, a process
reads every `world_size`-th row. How far an epoch has come is therefore one number for all processes, the rows consumed,
from which any number of processes can go on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

POOL_STEPS = 50
"""Bucketing sorts the rows of this many steps by length: many enough for even batches, few enough to stay random."""

STATE_VERSION = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stretch of an epoch with one batch size and one number of processes.

    Attributes:
        batch_size: Rows a process reads in a step.
        world_size: Number of processes.
        consumed: Rows that all of them have read together.
    """

    batch_size: int
    world_size: int
    consumed: int = 0

    @property
    def step(self) -> int:
        """Rows that all processes read in a step."""
        return self.batch_size * self.world_size


@dataclass
class BatchPlan:
    """The batches of one process, epoch after epoch.

    The order of an epoch depends on `seed` and its number only. Its last step takes what is left: fewer rows than the
    others, shared as evenly as possible. Rows fewer than there are processes join the step before, so that all
    processes have the same number of batches and no batch is empty. With `drop_last` they are left out instead.

    Attributes:
        count: Number of rows.
        batch_size: Rows a process reads in a step.
        rank: Number of this process.
        world_size: Number of processes.
        shuffle: Whether each epoch has its own random order.
        seed: Chooses the orders.
        drop_last: Whether to leave out the incomplete last step.
        lengths: Length of each row, to put rows of similar length into one step; None not to.
        epoch: Number of the epoch.
        past: The stretches of this epoch before the present one, when it was resumed with other settings.
        consumed: Rows that all processes have read together in the present stretch.
    """

    count: int
    batch_size: int
    rank: int
    world_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    lengths: Array | None
    epoch: int = 0
    past: list[Stage] = field(default_factory=list)
    consumed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, but is {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"`rank` must be in [0, world_size = {self.world_size}), but is {self.rank}")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, but is {self.seed}")
        needed = self.batch_size * self.world_size if self.drop_last else self.world_size
        if self.count < needed:
            reason = "a full step of all processes" if self.drop_last else "one row for each process"
            raise ValueError(f"the data set has {self.count} rows, but {reason} needs {needed}")
        if self.lengths is not None and len(self.lengths) != self.count:
            raise ValueError(f"there are {len(self.lengths)} lengths for the data set's {self.count} rows")

    @property
    def steps(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self._bounds(self.count)) - 1

    def remaining(self) -> tuple[list[Array], list[int]]:
        """The batches of this process that the epoch still has.

        Returns:
            The row numbers of each batch; and for each, how much `consumed` will be once it has been read.
        """
        order = self._order()
        bounds = self._bounds(len(order))
        batches, ends = [], []
        for start, end in pairwise(bounds):
            if start >= self.consumed and start + self.rank < end:
                batches.append(order[start + self.rank : end : self.world_size])
                ends.append(end)
        return batches, ends

    def start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.past, self.consumed = epoch, [], 0

    def state(self) -> dict[str, Any]:
        """Where the epoch stands, as plain numbers; the same in all processes."""
        stages = [*self.past, Stage(self.batch_size, self.world_size, self.consumed)]
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "stages": [[stage.batch_size, stage.world_size, stage.consumed] for stage in stages],
            **self._settings(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where an epoch stood, perhaps with another batch size or number of processes.

        Raises:
            ValueError: The state is of other rows or another order.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"the loader's state has version {state.get('version')}, but known is {STATE_VERSION}")
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(f"the loader's state was saved with {name} {state[name]}, but here it is {value}")
        *past, last = [Stage(*stage) for stage in state["stages"]]
        self.epoch = state["epoch"]
        if (last.batch_size, last.world_size) == (self.batch_size, self.world_size):
            self.past, self.consumed = past, last.consumed
            return
        self.past, self.consumed = [*past, last] if last.consumed else past, 0
        left = self.count - sum(stage.consumed for stage in self.past)
        if 0 < left < self.world_size:
            logger.warning("epoch %d has %d rows left for %d processes", self.epoch, left, self.world_size)

    def _settings(self) -> dict[str, Any]:
        """What must be the same for an epoch to go on."""
        return {
            "count": self.count,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "bucketed": self.lengths is not None,
        }

    def _bounds(self, count: int) -> list[int]:
        """Where each step begins, and the end of the last, for this many rows."""
        step = self.batch_size * self.world_size
        bounds = list(range(0, count - count % step + 1, step))
        rest = count - bounds[-1]
        if rest and not self.drop_last:
            if rest < self.world_size and len(bounds) > 1:
                bounds.pop()
            bounds.append(count)
        return bounds

    def _order(self) -> Array:
        """All rows of the present stretch, those that were read in it first."""
        order = np.arange(self.count)
        if self.shuffle:
            order = self._random(0).permutation(order)
        for number, stage in enumerate(self.past, start=1):
            order = self._bucketed(order, stage.step, number)[stage.consumed :]
        return self._bucketed(order, self.batch_size * self.world_size, len(self.past) + 1)

    def _bucketed(self, order: Array, step: int, number: int) -> Array:
        """Reorder rows so that those of one step have similar lengths."""
        if self.lengths is None:
            return order
        pools = [order[start : start + POOL_STEPS * step] for start in range(0, len(order), POOL_STEPS * step)]
        by_length = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        order = np.concatenate(by_length) if by_length else order
        whole = len(order) // step
        if self.shuffle:
            # The incomplete step stays last.
            steps = self._random(number).permutation(order[: whole * step].reshape(whole, step))
            order = np.concatenate([steps.reshape(-1), order[whole * step :]])
        return order

    def _random(self, number: int) -> np.random.RandomState:
        # NumPy has frozen this generator's stream for good, so a saved epoch goes on alike under a newer NumPy.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, self.epoch, number]))
        return np.random.RandomState(bits)
