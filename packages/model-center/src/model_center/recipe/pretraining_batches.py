"""From samples to what a model takes: rows, padding, packing, masks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_center.dataset.indexed.objectives import IGNORED, Sample
from model_center.layer import AttentionMask

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        inputs: Keyword arguments of the model's `forward`: tensors and `AttentionMask`s.
        labels: Shape (rows, length), -100 where there is nothing to predict; in the CPU's memory.
        lengths: Tokens of each document that sees no other, on each side; padding is not counted.
    """

    inputs: dict[str, Any]
    labels: Tensor
    lengths: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding, on all sides."""
        return sum(map(sum, self.lengths))

    @property
    def targets(self) -> int:
        """Number of labels that are to be predicted."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its inputs on a device; pinned memory is copied in the background.

        Labels stay where they are: the loss finds the targets in them, and on a GPU the host would have to wait for it.
        """
        inputs = self._changed_inputs(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(self, inputs=inputs)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which GPUs copy faster and in the background."""
        return replace(self, inputs=self._changed_inputs(Tensor.pin_memory), labels=self.labels.pin_memory())

    def _changed_inputs(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {name: _changed(value, change) for name, value in self.inputs.items()}


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, AttentionMask):
        tensors: dict[str, Any] = {
            field.name: change(tensor)
            for field in fields(value)
            if isinstance(tensor := getattr(value, field.name), Tensor)
        }
        return replace(value, **tensors)
    return value


@dataclass(frozen=True)
class StepBatches:
    """What one process gets for one step.

    Attributes:
        batches: Micro-batches, as many in every process.
        targets: Number of targets of the whole global batch, over all processes: what its summed loss is divided by.
        samples: Numbers, in the corpus, of this process's samples.
    """

    batches: list[Batch]
    targets: int
    samples: list[int]


@dataclass(frozen=True)
class Collator:
    """Puts samples into rows, and names the result as a family's `forward` does.

    Attributes:
        model_type: The family.
        packed: Whether rows hold several documents that must not see each other.
        takes_positions: Whether the model takes `position_ids`.
        sides: Tokens of a row on each side, when all rows are to be padded to that; None pads to the longest row.
    """

    model_type: str
    packed: bool
    takes_positions: bool
    sides: tuple[int, ...] | None

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        """Return the micro-batch of some rows; without any, one row without targets."""
        samples = [sample for row in rows for sample in row]
        row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        main = self._side(samples, row_of, len(rows), "input_ids", 0)
        sides = [main]
        if self.model_type in _SEQ2SEQ:
            sides.append(self._side(samples, row_of, len(rows), "decoder_input_ids", 1))
        labels = sides[-1].filled("labels", IGNORED)
        lengths = tuple(side.document_lengths for side in sides)
        name_inputs: Callable[..., dict[str, Any]] = _NAMES.get(self.model_type, _stack_inputs)
        return Batch(name_inputs(self, *sides), labels, lengths)

    def _side(self, samples: list[Sample], row_of: IntArray, rows: int, name: str, number: int) -> "_Side":
        width = None if self.sides is None else self.sides[number]
        return _Side(samples, row_of, max(1, rows), name, width)

    def mask(self, side: "_Side") -> AttentionMask:
        """What may be attended on one side."""
        return AttentionMask(
            lengths=side.lengths,
            documents=side.documents if self.packed else None,
            context=side.filled("context", False) if side.has("context") else None,
        )


class _Side:
    """Where each token of each sample lies in the rows of one side."""

    def __init__(self, samples: list[Sample], row_of: IntArray, rows: int, name: str, width: int | None) -> None:
        self._samples = samples
        sizes = np.array([len(sample[name]) for sample in samples], dtype=np.int64)
        ends = np.cumsum(sizes)
        used = np.bincount(row_of, weights=sizes, minlength=rows).astype(np.int64)
        self.tokens = int(used.sum())
        self.lengths = torch.from_numpy(used)
        self.shape = (rows, max(1, int(used.max())) if width is None else width)
        # Rows come one after the other, so a token's column is its place among all tokens, less those of earlier rows.
        before = np.cumsum(used) - used
        row_of_token = np.repeat(row_of, sizes)
        self._places = np.arange(self.tokens) - before[row_of_token] + row_of_token * self.shape[1]
        self._starts, self._sizes = ends - sizes, sizes
        first_of_row = np.searchsorted(row_of, row_of)
        self._ordinals = np.arange(len(samples)) - first_of_row
        self.ids = self.filled(name, 0)

    def has(self, name: str) -> bool:
        """Whether the samples hold such an array."""
        return bool(self._samples) and name in self._samples[0]

    def filled(self, name: str, filler: int) -> Tensor:
        """The samples' arrays of this name in their rows, (rows, length)."""
        return self._scattered(np.concatenate([sample[name] for sample in self._samples] or [np.zeros(0, int)]), filler)

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Tokens of each document; a sample is one, unless it tells of several."""
        if not self.has("documents"):
            return tuple(self._sizes.tolist())
        edges = [np.flatnonzero(np.diff(sample["documents"], prepend=-1, append=-1)) for sample in self._samples]
        return tuple(np.concatenate([np.diff(places) for places in edges]).tolist())

    @property
    def documents(self) -> Tensor:
        """Which document of its row a token belongs to; padding is one of its own, -1."""
        if self.has("documents"):
            return self.filled("documents", -1)
        return self._scattered(np.repeat(self._ordinals, self._sizes), -1)

    @property
    def positions(self) -> Tensor:
        """Positions counted anew in each document, 0 in padding."""
        if self.has("position_ids"):
            return self.filled("position_ids", 0)
        return self._scattered(np.arange(self.tokens) - np.repeat(self._starts, self._sizes), 0)

    def _scattered(self, values: npt.NDArray[Any], filler: int) -> Tensor:
        rows = np.full(self.shape[0] * self.shape[1], filler, dtype=bool if values.dtype == bool else np.int64)
        rows[self._places] = values
        return torch.from_numpy(rows.reshape(self.shape))


def _stack_inputs(collator: Collator, side: _Side) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": side.ids, "attention_mask": collator.mask(side)}
    if collator.packed and collator.takes_positions:
        inputs["position_ids"] = side.positions
    return inputs


def _cpm1_inputs(collator: Collator, side: _Side) -> dict[str, Any]:  # noqa: ARG001  # spans separate documents always
    nothing = torch.zeros(side.shape, dtype=torch.bool)
    context = side.filled("context", False) if side.has("context") else nothing
    return {"input": side.ids, "length": side.lengths, "context": context, "span": side.documents}


def _seq2seq_inputs(collator: Collator, encoder: _Side, decoder: _Side) -> dict[str, Any]:
    if not collator.packed:
        return {
            "input_ids": encoder.ids,
            "length": encoder.lengths,
            "decoder_input_ids": decoder.ids,
            "decoder_length": decoder.lengths,
        }
    return {
        "input_ids": encoder.ids,
        "attention_mask": collator.mask(encoder),
        "decoder_input_ids": decoder.ids,
        "decoder_attention_mask": collator.mask(decoder),
    }


def _cpm2_inputs(collator: Collator, encoder: _Side, decoder: _Side) -> dict[str, Any]:
    given = _seq2seq_inputs(collator, encoder, decoder)
    lengths = {"enc_length": given.pop("length", None), "dec_length": given.pop("decoder_length", None)}
    return {"enc_input": given.pop("input_ids"), "dec_input": given.pop("decoder_input_ids"), **lengths, **given}


_SEQ2SEQ = frozenset({"t5", "cpm2"})
_NAMES: dict[str, Callable[..., dict[str, Any]]] = {
    "cpm1": _cpm1_inputs,
    "t5": _seq2seq_inputs,
    "cpm2": _cpm2_inputs,
}
