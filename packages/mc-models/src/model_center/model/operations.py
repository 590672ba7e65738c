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
        """From our side to theirs.

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
    """Their one tensor is used in several places, each of which has its own tensor here."""

    copies: int

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Repeats the one tensor."""
        (tensor,) = tensors
        return [tensor] * self.copies

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Takes the tensor that all places share."""
        if any(not torch.equal(tensors[0], other) for other in tensors[1:]):
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
