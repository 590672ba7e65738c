"""Examples kept as arrays, and batches made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from .._extra import torch

Padding = Literal["batch", "max_length"]
Encoded = Mapping[str, Sequence[int] | int]
"""One example as model input: a sequence or a single number for each name."""


@dataclass(frozen=True)
class Layout:
    """How one entry of an example becomes a row of a batch.

    Attributes:
        fill: What pads it to the length of the batch; None if it is a single number.
        limit: Name of the argument with its maximum length.
        kind: NumPy's name of its type.
    """

    fill: int | None = None
    limit: str = ""
    kind: str = "int64"


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths, one behind the other.

    Attributes:
        values: All sequences.
        bounds: Where each begins, and the end of the last.
    """

    values: np.ndarray[Any, Any]
    bounds: np.ndarray[Any, Any]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        """Collect sequences."""
        bounds = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(sequence) for sequence in sequences], out=bounds[1:])
        # Token ids fit 32 bits; batches widen them to what embeddings are indexed with.
        values = np.fromiter(chain.from_iterable(sequences), np.int32, int(bounds[-1]))
        return cls(values, bounds)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        return self.values[self.bounds[index] : self.bounds[index + 1]]

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Length of each sequence."""
        return np.diff(self.bounds)


Column = Ragged | np.ndarray[Any, Any]


def columns_of(examples: Sequence[Encoded]) -> dict[str, Column]:
    """Turn examples, which all have the same names, into one column a name."""
    columns: dict[str, Column] = {}
    for name, first in examples[0].items():
        values: list[Any] = [example[name] for example in examples]
        columns[name] = np.asarray(values, dtype=np.int64) if isinstance(first, int) else Ragged.of(values)
    return columns


def stack(
    items: Sequence[Mapping[str, torch.Tensor]], layout: Mapping[str, Layout], lengths: Mapping[str, int] | None
) -> dict[str, torch.Tensor]:
    """Make a batch of items.

    Args:
        items: Items with the same names; sequences of shape (length), numbers of shape ().
        layout: How each name is padded.
        lengths: Length to pad to, by the name of the limit; that of the longest item if None.

    Returns:
        Tensors of shape (batch, length) and (batch).
    """
    batch = {}
    for name, first in items[0].items():
        fill = layout[name].fill
        if fill is None:
            batch[name] = torch.stack([item[name] for item in items])
            continue
        longest = lengths[layout[name].limit] if lengths else max(len(item[name]) for item in items)
        rows = torch.full((len(items), longest), fill, dtype=first.dtype)
        for row, item in zip(rows, items, strict=True):
            row[: len(item[name])] = item[name]
        batch[name] = rows
    return batch
