"""A shuffled order of any length that is computed, not stored."""

from __future__ import annotations

from math import isqrt
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .format import IntArray

_MASK = (1 << 64) - 1
_ROUNDS = 8
_Word = TypeVar("_Word", int, npt.NDArray[Any])


class Permutation:
    """A pseudo-random order of the numbers below `length`, each computed in microseconds, without a table.

    A Feistel network over a rectangle of at least `length` cells, whose few cells beyond are walked past
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        length: How many numbers there are.
        seed: Chooses the order.
        epoch: Chooses another order with the same seed.
    """

    def __init__(self, length: int, seed: int, epoch: int = 0) -> None:
        self.length = length
        self._rows = isqrt(max(0, length - 1)) + 1
        self._columns = max(1, -(-length // self._rows))
        keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
        self._keys = [int(key) for key in keys]

    def __getitem__(self, position: int) -> int:
        """Return the number at a position of the order."""
        number = self._step(position)
        while number >= self.length:
            number = self._step(number)
        return number

    def gather(self, positions: IntArray) -> IntArray:
        """Return the numbers at many positions, of shape (positions,)."""
        numbers = self._step(positions.astype(np.uint64))
        while (outside := numbers >= self.length).any():
            numbers[outside] = self._step(numbers[outside])
        signed: IntArray = numbers.astype(np.int64)
        return signed

    def _step(self, value: _Word) -> _Word:
        """Permute the cells of the rectangle; integers and arrays of uint64 give the same."""
        row, column = value % self._rows, value // self._rows
        for row_key, column_key in zip(self._keys[::2], self._keys[1::2], strict=True):
            row = (row + _mixed(column, row_key) % self._rows) % self._rows
            column = (column + _mixed(row, column_key) % self._columns) % self._columns
        cell: _Word = row + column * self._rows
        return cell


def _mixed(value: _Word, key: int) -> _Word:
    """Return 64 bits that depend on all bits of `value` (the finalizer of SplitMix64)."""
    value = (value ^ key) * 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
