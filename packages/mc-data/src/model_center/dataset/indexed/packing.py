"""Several documents in one row, with their boundaries, so that no room is lost to padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from .format import complete_boundaries
from .objectives import IGNORED, Sample
from .reader import MMapIndexedDataset


class FullRows(Sequence[Sample]):
    """A data set as one stream of tokens, cut into rows of one length: causal language modelling without padding.

    Row i begins at token i * length, so any row is found at once. Documents that a row's edge cuts go on in the next.

    Args:
        source: The data set.
        length: Tokens of a row.
        pad_id: Fills the last row.
    """

    def __init__(self, source: MMapIndexedDataset, length: int, *, pad_id: int = 0) -> None:
        if length < 1:
            raise ValueError(f"`length` must be at least 1, but is {length}")
        self.source, self.length, self.pad_id = source, length, pad_id
        boundaries = complete_boundaries(source.doc_idx, len(source))
        self._starts = np.append(source.pointers // source.dtype.itemsize, len(source.tokens))[boundaries]

    def __len__(self) -> int:
        return (len(self.source.tokens) + self.length - 1) // self.length

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Return a row, or the list of a slice's.

        Returns:
            `input_ids`, `labels` (-100 where a document ends), `documents` (which document of the row a token belongs
            to, as `AttentionMask` takes it; padding is one of its own) and `position_ids` (counted from the start of
            the document, or of the row when that comes later), all of shape (length,).
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"the index must lie in [-{len(self)}, {len(self)}), but is {index}")
        begin = index % len(self) * self.length
        self.source.touched(1, self.length)
        tokens = self.source.tokens[begin : begin + self.length + 1].astype(np.int64)
        places = np.arange(begin, begin + self.length)
        number = np.searchsorted(self._starts, np.append(places, begin + self.length), side="right")
        labels = np.full(self.length, IGNORED)
        labels[: len(tokens) - 1] = tokens[1:]
        labels[number[1:] != number[:-1]] = IGNORED
        number = number[:-1]
        inputs = np.full(self.length, self.pad_id)
        inputs[: min(len(tokens), self.length)] = tokens[: self.length]
        return {
            "input_ids": inputs,
            "labels": labels,
            "documents": number - number[0],
            "position_ids": places - np.maximum(self._starts[number - 1], begin),
        }

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))


def pack_samples(samples: Iterable[Sample], length: int, *, open_rows: int = 8, pad_id: int = 0) -> Iterator[Sample]:
    """Put samples, each whole, into rows of one length: the first row that has room takes the next sample.

    Args:
        samples: Of objectives whose arrays have one common length, such as `ContextSpan`.
        length: Tokens of a row.
        open_rows: How many rows wait to be filled; more lose less room.
        pad_id: Fills up `input_ids`; `labels` are filled with -100, everything else with 0.

    Yields:
        The samples' arrays, of shape (length,), with `documents` and `position_ids` as `FullRows` gives them, and
        `samples`, of shape (1,): how many samples the row holds.

    Raises:
        ValueError: A sample is longer than a row, or its arrays have different lengths.
    """
    rows: list[list[Sample]] = []
    used: list[int] = []
    for number, sample in enumerate(samples):
        sizes = {name: len(values) for name, values in sample.items()}
        size = sizes["input_ids"]
        if set(sizes.values()) != {size} or size > length:
            raise ValueError(
                f"a sample must have one length of at most `length` ({length}), but sample {number} has {sizes}"
            )
        place = next((i for i, taken in enumerate(used) if taken + size <= length), None)
        if place is None:
            if len(rows) == open_rows:
                used.pop(0)
                yield _row(rows.pop(0), length, pad_id)
            rows.append([])
            used.append(0)
            place = -1
        rows[place].append(sample)
        used[place] += size
    for row in rows:
        yield _row(row, length, pad_id)


def _row(samples: list[Sample], length: int, pad_id: int) -> Sample:
    sizes = [len(sample["input_ids"]) for sample in samples]
    rest = length - sum(sizes)
    fill = {"input_ids": pad_id, "labels": IGNORED}
    row = {
        name: np.concatenate(
            [*(sample[name] for sample in samples), np.full(rest, fill.get(name, 0), dtype=samples[0][name].dtype)]
        )
        for name in samples[0]
    }
    row["documents"] = np.repeat(np.arange(len(samples) + 1), [*sizes, rest])
    row["position_ids"] = np.concatenate([np.arange(size) for size in (*sizes, rest)])
    row["samples"] = np.array([len(samples)])
    return row


class PairedDataset(Sequence[Sample]):
    """Inputs and targets from two data sets, padded to one length each (`CPM1_Dataset`, `CPM2_Dataset`).

    Args:
        inputs: Sequences for the model, or for its encoder.
        targets: Sequences of the same number, for the loss.
        max_length: Room for inputs; longer ones are cut.
        max_target_length: Room for targets; longer ones are cut. None: they belong to the inputs position by position,
            as CPM-1's do, and must have their length.
        moved_ids: `(first, distance)`: ids from `first` on are lowered by `distance`. CPM-2's old files number its
            sentinels 190 too high: `(26240, 190)`.
    """

    def __init__(
        self,
        inputs: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        *,
        max_length: int,
        max_target_length: int | None = None,
        moved_ids: tuple[int, int] | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"`targets` must have as many sequences as `inputs` ({len(inputs)}), but has {len(targets)}"
            )
        self.inputs, self.targets = inputs, targets
        self.max_length, self.max_target_length, self.moved_ids = max_length, max_target_length, moved_ids

    def __len__(self) -> int:
        return len(self.inputs)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Return one sample, or the list of a slice's.

        Returns:
            `input_ids` of shape (max_length,), padded with 0, `labels` of shape (max_target_length,) or (max_length,),
            padded with -100, and `length` and `target_length`, without padding, of shape ().
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        inputs, targets = self.inputs[index], self.targets[index]
        if self.max_target_length is None and len(inputs) != len(targets):
            raise ValueError(
                f"targets must be as long as inputs, but sample {index} has {len(targets)} and {len(inputs)}"
            )
        target_room = self.max_length if self.max_target_length is None else self.max_target_length
        return {
            "input_ids": self._padded(inputs, self.max_length, 0),
            "labels": self._padded(targets, target_room, IGNORED),
            "length": np.array(min(len(inputs), self.max_length)),
            "target_length": np.array(min(len(targets), target_room)),
        }

    def _padded(self, tokens: np.ndarray, room: int, filler: int) -> np.ndarray:
        ids = tokens[:room].astype(np.int64)
        if self.moved_ids is not None:
            first, distance = self.moved_ids
            ids = np.where(ids >= first, ids - distance, ids)
        return np.pad(ids, (0, room - len(ids)), constant_values=filler)
