"""Which samples share a row: decided from their sizes alone, so that every process can know it of all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .format import IntArray


def pack_rows(sizes: npt.ArrayLike, room: Sequence[int]) -> list[list[int]]:
    """Put samples, each whole, into as few rows as first-fit decreasing finds.

    Args:
        sizes: Tokens of each sample on each side (an encoder-decoder has two), of shape (samples, sides).
        room: Tokens of a row on each side.

    Returns:
        The numbers of the samples in each row, the rows with the longest samples first.

    Raises:
        ValueError: A sample is longer than a row.
    """
    wanted: IntArray = np.asarray(sizes, dtype=np.int64).reshape(-1, len(room))
    free = np.tile(np.asarray(room, dtype=np.int64), (len(wanted), 1))
    too_long = (wanted > free).any(axis=1)
    if too_long.any():
        sample = int(too_long.argmax())
        raise ValueError(
            f"samples must have at most `room` ({list(room)}) tokens, but sample {sample} has {wanted[sample].tolist()}"
        )
    order = np.argsort(-wanted.max(axis=1, initial=0), kind="stable")
    rows: list[list[int]] = []
    first = 0  # rows before it have no room for any sample that is left
    smallest = wanted.min(axis=0, initial=int(max(room)))
    for sample in order.tolist():
        size = wanted[sample]
        # One row more than there are: an empty one, which takes any sample.
        place = first + int((free[first : len(rows) + 1] >= size).all(axis=1).argmax())
        if place == len(rows):
            rows.append([])
        rows[place].append(sample)
        free[place] -= size
        while first < len(rows) and (free[first] < smallest).any():
            first += 1
    return rows
