"""The reversible operations by which a tensor of another system's checkpoint becomes tensors of ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Operation(Protocol):
    """Turns a list of tensors into another, and back."""

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """From their side to ours."""

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """From our side to theirs; `tensors` are followed by those that the rule names as `beside`.

        Raises:
            ValueError: our tensors cannot be expressed on their side; the message says why.
        """


@dataclass(frozen=True)
class Transpose:
    """Their matrix is stored as (in, out), ours as (out, in); vectors stay as they are."""

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Transposes each matrix."""
        return [tensor.T if tensor.ndim == 2 else tensor for tensor in tensors]

    to_theirs = to_ours


@dataclass(frozen=True)
class Split:
    """Their one tensor holds several of ours, stacked along the first dimension.

    Attributes:
        parts: number of equal parts, or the size of each.
    """

    parts: int | tuple[int, ...]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Cuts the one tensor."""
        (tensor,) = tensors
        rows = tensor.shape[0]
        sizes = (rows // self.parts,) * self.parts if isinstance(self.parts, int) else self.parts
        if sum(sizes) != rows:
            wanted = f"a multiple of {self.parts}" if isinstance(self.parts, int) else f"{sum(sizes)}, that of {sizes}"
            raise ValueError(f"its first dimension must be {wanted}, but is {rows}")
        return list(tensor.split(sizes))

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Stacks the parts."""
        return [torch.cat(list(tensors))]


@dataclass(frozen=True)
class Duplicate:
    """Their one tensor is used in several places, each of which has its own tensor here.

    Attributes:
        copies: number of places.
        made_up_for: whether other rules make up for what the other tensors differ in from the first.
    """

    copies: int
    made_up_for: bool = False

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Repeats the one tensor."""
        (tensor,) = tensors
        return [tensor] * self.copies

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Takes the tensor that all places share, or that all places can do with."""
        if not self.made_up_for and any(not torch.equal(tensors[0], other) for other in tensors[1:]):
            raise ValueError("they must be equal, because the other side has only one tensor for them, but they differ")
        return [tensors[0]]


@dataclass(frozen=True)
class PadRows:
    """Ours has `rows` more rows than theirs, at the end (vocabulary entries that only fill up); zero on import."""

    rows: int

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Adds rows of zeros."""
        return [torch.cat([tensor, tensor.new_zeros(self.rows, *tensor.shape[1:])]) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Cuts the rows off."""
        return [tensor[: -self.rows] for tensor in tensors]


@dataclass(frozen=True)
class Scale:
    """Ours is theirs times `factor`; PyTorch computes it in float32 for half types, and rounds once."""

    factor: float

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Multiplies."""
        return [tensor * self.factor for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Divides."""
        return [tensor / self.factor for tensor in tensors]


@dataclass(frozen=True)
class FoldNormIntoWeight:
    """The weight of a linear layer that reads a norm of its own here, and there another norm of the same states.

    Both norms turn standardised states x into `x * scale + shift`. The layer returns the same there if its weight is
    multiplied by `ratio = scale / their_scale`, and `FoldNormIntoBias` makes up for the shifts.
    """

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Changes nothing: the two norms are equal then."""
        return list(tensors)

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Multiplies the weight; beside it come the scale of the norm that they have, and its own norm's."""
        weight, *scales = tensors
        ratio = _ratio(*scales)
        if (ratio == 1).all():
            return [weight]
        folded = torch.empty_like(weight)
        for ours, theirs in zip(_pieces(weight), _pieces(folded), strict=True):
            theirs.copy_(ours * ratio)
        return [_within_range(folded, weight)]


@dataclass(frozen=True)
class FoldNormIntoBias:
    """The bias of the layer of `FoldNormIntoWeight`: theirs is ours plus `weight @ (shift - ratio * their_shift)`."""

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Changes nothing: the two norms are equal then."""
        return list(tensors)

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Adds to the bias; beside it come the weight, the scales of both norms, and their shifts, theirs first."""
        bias, weight, their_scale, scale, their_shift, shift = tensors
        missing = shift.double() - _ratio(their_scale, scale) * their_shift
        if not missing.any():
            return [bias]
        added = torch.cat([piece.double() @ missing for piece in _pieces(weight)])
        return [_within_range((bias + added).to(bias.dtype), bias)]


_PIECE_ELEMENTS = 2**20
"""How much of a weight exists in float64 at a time (8 MiB)."""


def _pieces(matrix: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = matrix.split(max(1, _PIECE_ELEMENTS // matrix.shape[1]))
    return pieces


def _ratio(their_scale: Tensor, scale: Tensor) -> Tensor:
    """What a norm's scale is of that of the norm which they have, in float64; 1 where both are 0."""
    undefined = ((their_scale == 0) & (scale != 0)).nonzero().flatten().tolist()
    if undefined:
        raise ValueError(
            f"the other side has only the first of the two norms, whose weight must not be 0 where the second's is "
            f"not, but is at {len(undefined)} of {len(scale)} positions, the first of them {undefined[0]}; "
            f"set the second's to 0 there, too, or the first's to another number"
        )
    return torch.where(scale == their_scale, 1.0, scale.double() / their_scale.double())


def _within_range(theirs: Tensor, ours: Tensor) -> Tensor:
    if ours.isfinite().all() and not theirs.isfinite().all():
        raise ValueError(
            f"making up for the difference of the two norms must stay within the range of {theirs.dtype}, but does "
            f"not; load the model with a wider `dtype` before the export"
        )
    return theirs
