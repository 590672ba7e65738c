"""Initialisers: what a fresh parameter holds. Small values that any engine can apply to whole or sharded storage."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch


class Initializer(Protocol):
    """Fills a tensor in place, from torch's global random generator where it is random."""

    def __call__(self, tensor: torch.Tensor) -> None:
        """Fills `tensor` (any shape, floating point) in place."""


@dataclass(frozen=True)
class Normal:
    """Normal distribution.

    Args:
        mean: Mean of the distribution.
        std: Standard deviation, not negative.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"`mean` must be a finite number, but is {self.mean}")
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"`std` must be a finite number of at least 0, but is {self.std}")

    def __call__(self, tensor: torch.Tensor) -> None:
        """Fills `tensor` in place."""
        with torch.no_grad():
            tensor.normal_(self.mean, self.std)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere.

    Args:
        value: The value.
    """

    value: float = 0.0

    def __call__(self, tensor: torch.Tensor) -> None:
        """Fills `tensor` in place."""
        with torch.no_grad():
            tensor.fill_(self.value)


_fills = True  # as which engine runs, it is the same for all threads


def fills_parameters() -> bool:
    """Whether a new parameter gets its initial values; False in `uninitialized`."""
    return _fills


@contextmanager
def uninitialized() -> Iterator[None]:
    """Parameters made in it are allocated, but hold whatever was in memory: for models that are loaded right away.

        with engine.uninitialized():
            model = Bert(config)
        engine.load(model, path)

    It spares the random numbers, which take a CPU minutes for billions of parameters, and leaves the random generators
    as they are. What a load that is not strict passes over must be filled with `init_parameters`.
    """
    global _fills  # noqa: PLW0603
    previous, _fills = _fills, False
    try:
        yield
    finally:
        _fills = previous
