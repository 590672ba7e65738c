"""Initialisers: what a fresh parameter holds. Small values that any engine can apply to whole or sharded storage."""

import math
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
