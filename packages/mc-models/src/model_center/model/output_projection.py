"""The last step of every head, a matrix product: its scores, and their cross entropy without ever holding all scores.

A vocabulary of 50,000 makes the scores the largest tensor of a small model. The loss needs them only where there is a
label, only one piece at a time, and no longer than it takes to compute that piece's gradient.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model_center.engine.loss import FusedCrossEntropy
from model_center.layer import Embedding, Linear

IGNORED = -100
"""The label of positions that do not count."""
PIECE_SCORES = 2**26
"""How many scores exist at a time (128 MiB in half precision, and as much for their gradient)."""
_FP16_SCALE = 2.0**12  # probabilities below 6e-8 would be zero in a float16 gradient


@dataclass(frozen=True, eq=False)
class OutputProjection:
    """A head's hidden states and what they are multiplied by: scores are `states @ weight.T + bias`.

    Attributes:
        states: (…, dim_model).
        weight: (classes, dim_model).
        bias: (classes,), if there is one.
        padding_ids: as many classes at the end only fill up; their score is minus infinity.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    padding_ids: int = 0

    @classmethod
    def through(cls, layer: Linear | Embedding, states: Tensor, **more: Any) -> "OutputProjection":
        """That of a linear layer, or of an embedding whose rows are the weight; `more` are other attributes."""
        weight = layer.float_weight()
        if layer.length_scale:
            states = states / math.sqrt(weight.shape[1])
        if isinstance(layer, Linear):
            more["bias"] = layer.bias
        return cls(states, weight, **more)

    def scores(self) -> Tensor:
        """All scores, (…, classes)."""
        return _scores(self.states, self.weight, self.bias, self.padding_ids)

    def summed_loss(self, labels: Tensor) -> Tensor:
        """Cross entropy of states (rows, dim_model) and labels (rows,), all of which count, summed over the rows."""
        inputs = (self.states, self.weight, self.bias)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
            return _summed_loss(*inputs, labels, self.padding_ids)
        return _PieceByPiece(*inputs, self.padding_ids).loss(labels)


def labelled(hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states (rows, dim_model) and labels (rows,) of positions whose label is not `IGNORED`.

    Args:
        hidden_states: (…, dim_model).
        labels: (…), on any device; on the CPU they spare the host the wait for the number of rows.

    Raises:
        ValueError: the shapes do not fit.
    """
    if hidden_states.shape[:-1] != labels.shape:
        raise ValueError(
            f"`labels` must have the shape of `hidden_states` without its last dimension, "
            f"{tuple(hidden_states.shape[:-1])}, but has {tuple(labels.shape)}"
        )
    labels = labels.flatten()
    positions = (labels != IGNORED).nonzero().squeeze(1)
    rows = hidden_states.flatten(0, -2)
    if len(positions) < len(rows):
        labels = labels[positions]
        rows = rows.index_select(0, positions.to(rows.device, non_blocking=True))
    return rows, labels.to(rows.device, non_blocking=True)


def _scores(states: Tensor, weight: Tensor, bias: Tensor | None, padding_ids: int) -> Tensor:
    scores = F.linear(states, weight, bias)
    if padding_ids:
        scores[..., -padding_ids:] = float("-inf")
    return scores


@dataclass(frozen=True, eq=False)
class _PieceByPiece:
    """Cross entropy of the scores of as many rows at a time as have `PIECE_SCORES`."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None
    padding_ids: int

    def _pieces(self) -> Iterator[slice]:
        step = max(1, PIECE_SCORES // len(self.weight))
        return (slice(start, start + step) for start in range(0, len(self.states), step))

    @property
    def _exact(self) -> torch.dtype:
        """What sums are computed in."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def loss(self, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=self._exact, device=self.states.device)
        for rows in self._pieces():
            scores = _scores(self.states[rows], self.weight, self.bias, self.padding_ids)
            total += FusedCrossEntropy(reduction="sum")(scores, labels[rows])
        return total

    def loss_and_gradients(self, labels: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradients for states, weight and bias, in float32 at least, where they are wanted."""
        total = torch.zeros((), dtype=self._exact, device=self.states.device)
        gradients = [
            torch.zeros_like(tensor, dtype=self._exact) if tensor is not None and needed else None
            for tensor, needed in zip((self.states, self.weight, self.bias), wanted, strict=True)
        ]
        of_states, of_weight, of_bias = gradients
        for rows in self._pieces():
            states = self.states[rows]
            scores = _scores(states, self.weight, self.bias, self.padding_ids).requires_grad_()
            scale = _FP16_SCALE if scores.dtype is torch.float16 else 1.0
            with torch.enable_grad():
                loss = FusedCrossEntropy(reduction="sum")(scores, labels[rows])
            (of_scores,) = torch.autograd.grad(loss, scores, torch.full_like(loss, scale))
            total += loss.detach()
            if of_states is not None:
                of_states[rows] = _product(of_scores, self.weight, self._exact).div_(scale)
            if of_weight is not None:
                of_weight.add_(_product(of_scores.t(), states, self._exact), alpha=1 / scale)
            if of_bias is not None:
                of_bias.add_(of_scores.sum(0, dtype=self._exact), alpha=1 / scale)
        return total, gradients


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix product with a result of a wider type, so that sums neither overflow nor are rounded per piece."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _SummedLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, where each piece's scores are at hand."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, padding_ids: int
    ) -> Tensor:
        pieces = _PieceByPiece(states, weight, bias, padding_ids)
        total, gradients = pieces.loss_and_gradients(labels, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (states, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


_summed_loss: Callable[..., Tensor] = _SummedLoss.apply
