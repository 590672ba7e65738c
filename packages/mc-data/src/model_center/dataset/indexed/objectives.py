"""Training objectives, computed when a sequence is read, from the token ids alone.

Section 1.5.3 keeps only ids on the disk: what a task adds to them (masks, targets, spans) takes several times their
room and little time. Each objective here turns one sequence into a sample, a dictionary of arrays, drawing from a
random generator that `ObjectiveDataset` seeds for each sample.

`labels` holds, at each position, the id that the model is to predict there, and -100 where the loss is to look away, so
that `loss(logits, labels)` needs no shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from .distributed import DistributedMMapIndexedDataset
from .format import Array, IntArray
from .reader import MMapIndexedDataset

IGNORED = -100
Sample: TypeAlias = dict[str, Array]


class Objective(Protocol):
    """Turns a sequence into a sample."""

    def __call__(self, tokens: Array, random: np.random.Generator) -> Sample:
        """Return the sample's arrays.

        Args:
            tokens: Ids of one sequence, of shape (tokens,).
            random: What is drawn for the sample comes from here alone.
        """
        ...


class ObjectiveDataset(Sequence[Sample]):
    """The samples of a data set under an objective.

    Args:
        source: The sequences.
        objective: What becomes of them.
        seed: With the number of a sequence among all files, and with the epoch where the source has one, it decides
            what is drawn; so a sample is the same on any rank, in any order, and in any run.
        max_length: Longer sequences are cut to it; None keeps them.
    """

    def __init__(
        self,
        source: MMapIndexedDataset | DistributedMMapIndexedDataset,
        objective: Objective,
        *,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        self.source, self.objective, self.seed, self.max_length = source, objective, seed, max_length

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Return one sample, or the list of a slice's."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        tokens = self.source[index][: self.max_length]
        if isinstance(self.source, DistributedMMapIndexedDataset):
            key = [self.seed, self.source.epoch, self.source.sample_number(index)]
        else:
            key = [self.seed, 0, index % len(self)]
        return self.objective(tokens.astype(np.int64), np.random.default_rng(key))

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))


def next_tokens(tokens: IntArray) -> IntArray:
    """Return, for each position, the id that follows; nothing follows the last one."""
    return np.append(tokens[1:], IGNORED)[: len(tokens)]


@dataclass(frozen=True)
class CausalLM:
    """Predict every token from those before it."""

    def __call__(self, tokens: IntArray, random: np.random.Generator) -> Sample:  # noqa: ARG002  # nothing is drawn
        """Return `input_ids` and `labels`, both of shape (tokens,)."""
        return {"input_ids": tokens, "labels": next_tokens(tokens)}


@dataclass(frozen=True)
class PrefixLM:
    """Predict the rest of a sequence from a prefix that sees itself in both directions (Raffel et al., 2020).

    Attributes:
        shortest: Smallest share of the sequence that is prefix.
        longest: Largest share.
    """

    shortest: float = 0.0
    longest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.shortest <= self.longest <= 1:
            raise ValueError(f"`shortest` and `longest` must be 0 <= {self.shortest} <= {self.longest} <= 1")

    def __call__(self, tokens: IntArray, random: np.random.Generator) -> Sample:
        """Return `input_ids`, `labels` and `context` (which positions are prefix), all of shape (tokens,)."""
        length = len(tokens)
        low, high = max(1, int(self.shortest * length)), max(1, min(length - 1, int(self.longest * length)))
        prefix = int(random.integers(min(low, high), high + 1))
        labels = next_tokens(tokens)
        labels[: prefix - 1] = IGNORED
        return {"input_ids": tokens, "labels": labels, "context": np.arange(length) < prefix}


@dataclass(frozen=True)
class ContextSpan:
    """CPM-1's objective: write the middle of a text, seeing its start and its end (`CPM1_Dataset_Merge`).

    The span begins between an eighth and a quarter of the sequence, and ends in its last quarter, or with the sequence
    when that ends its document.

    Attributes:
        eod_id: Id that ends a document.
    """

    eod_id: int

    def __call__(self, tokens: IntArray, random: np.random.Generator) -> Sample:
        """Return `input_ids`, `labels` and `context` (which positions the span sees), all of shape (tokens,)."""
        length = len(tokens)
        begin = max(1, int(random.integers(length // 8, length // 4 + 1)))  # the first token has no one to predict it
        end = int(random.integers(length // 4 * 3, length + 1))
        if length and tokens[-1] == self.eod_id:
            end = length
        labels = np.full(length, IGNORED)
        labels[begin - 1 : max(begin, end) - 1] = tokens[begin : max(begin, end)]
        places = np.arange(length)
        return {"input_ids": tokens, "labels": labels, "context": (places < begin) | (places >= end)}


@dataclass(frozen=True)
class MaskedLM:
    """BERT's objective (Devlin et al., 2019): 15% of the tokens; of those 80% masked, 10% replaced, 10% left.

    Attributes:
        vocab_size: Replacements are drawn from all ids.
        mask_id: Id of the mask token.
        special_ids: Ids that are never chosen, such as `[CLS]` and `[SEP]`.
        share: How much of the other tokens is chosen; at least one is.
        continuations: For whole-word masking, whether an id continues the word before it (`##…`), of shape
            (vocab_size,): then words are chosen, all their tokens together.
    """

    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...] = ()
    share: float = 0.15
    continuations: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must lie above 0 and up to 1, but is {self.share}")
        if self.continuations is not None and len(self.continuations) != self.vocab_size:
            raise ValueError(
                f"`continuations` must have `vocab_size` ({self.vocab_size}) entries, not {len(self.continuations)}"
            )

    def __call__(self, tokens: IntArray, random: np.random.Generator) -> Sample:
        """Return `input_ids` and `labels`, both of shape (tokens,)."""
        ordinary = ~np.isin(tokens, self.special_ids)
        starts = (
            ordinary if self.continuations is None else ordinary & ~(self.continuations[tokens] & np.roll(ordinary, 1))
        )
        if len(tokens):
            starts[0] = ordinary[0]
        words = np.cumsum(starts) - 1  # special tokens get the number of the word before, and are left out below
        count = int(starts.sum())
        chosen = np.zeros(max(1, count), dtype=bool)
        chosen[random.permutation(count)[: max(1, round(self.share * count))]] = True
        masked = ordinary & chosen[words]
        kind = random.random(len(tokens))
        replacements = random.integers(0, self.vocab_size, len(tokens))
        changed = np.where(kind < 0.8, self.mask_id, np.where(kind < 0.9, replacements, tokens))
        return {"input_ids": np.where(masked, changed, tokens), "labels": np.where(masked, tokens, IGNORED)}


@dataclass(frozen=True)
class SpanCorruption:
    """T5's objective (Raffel et al., 2020): spans go, each leaves a sentinel, and the decoder writes them.

    Attributes:
        sentinel_ids: Ids of `<extra_id_0>`, `<extra_id_1>`, …
        eos_id: Ends the targets, and the inputs.
        start_id: What the decoder begins with (T5: the padding id).
        share: Share of the tokens that go.
        mean_span: Mean length of a span, in tokens.
    """

    sentinel_ids: tuple[int, ...]
    eos_id: int
    start_id: int
    share: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.mean_span < 1:
            raise ValueError(
                f"`share` must lie between 0 and 1, `mean_span` be at least 1: {self.share}, {self.mean_span}"
            )

    def lengths(self, length: int) -> tuple[int, int]:
        """Return how many tokens encoder and decoder get of a sequence of `length` tokens."""
        gone, spans = self._counts(length)
        return length - gone + spans + 1, gone + spans + 1

    def _counts(self, length: int) -> tuple[int, int]:
        """Return how many tokens go, in how many spans."""
        gone = min(max(1, round(length * self.share)), max(1, length - 1), length)
        spans = min(max(1, round(gone / self.mean_span)), max(1, length - gone), len(self.sentinel_ids))
        return gone, min(spans, max(1, gone))

    def __call__(self, tokens: IntArray, random: np.random.Generator) -> Sample:
        """Return `input_ids` for the encoder, and `decoder_input_ids` and `labels` of another, common length."""
        length = len(tokens)
        gone, spans = self._counts(length)
        # Kept and gone pieces alternate, kept first; each has at least one token where there are enough.
        kept_lengths, gone_lengths = _pieces(length - gone, spans, random), _pieces(gone, spans, random)
        inputs: list[Array] = []
        targets: list[Array] = []
        place = 0
        for sentinel, kept, lost in zip(self.sentinel_ids, kept_lengths, gone_lengths, strict=False):
            mark = np.array([sentinel])
            inputs += [tokens[place : place + kept], mark]
            targets += [mark, tokens[place + kept : place + kept + lost]]
            place += kept + lost
        end = np.array([self.eos_id])
        labels = np.concatenate([*targets, end])
        return {
            "input_ids": np.concatenate([*inputs, end]),
            "decoder_input_ids": np.concatenate([[self.start_id], labels[:-1]]),
            "labels": labels,
        }


def _pieces(total: int, count: int, random: np.random.Generator) -> list[int]:
    """Divide `total` into `count` random lengths, all at least 1 where `total` allows."""
    cuts = np.sort(random.permutation(max(0, total - 1))[: count - 1]) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], cuts, [total]])).tolist()
    return [0] * (count - len(lengths)) + lengths
