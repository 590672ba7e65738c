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

from model_center.engine.tensors import runs_triton
from model_center.layer import Embedding, Linear

IGNORED = -100
"""The label of positions that do not count."""
PIECE_SCORES = 2**26
"""How many scores exist at a time (128 MiB in half precision, and as much for their gradient)."""
_EXACT_SCORES = 2**22
"""How many of them exist in float32 at a time: little enough for a CPU to use the same memory again and again."""
_ALIGNED_CLASSES = 64
"""A vocabulary that is no multiple of it (GPT-2's 50,257) would keep tensor cores from their full speed."""
_FEW_ROWS = range(2, 7)
"""With so many rows, as in decoding a small batch, a CPU spends a quarter to three quarters of a float32 product on
rearranging the weight."""
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
        classes = len(self.weight)
        # On a GPU this would make the host wait; there the indexing kernel itself fails.
        if labels.device.type == "cpu" and len(wrong := labels[(labels < 0) | (labels >= classes)]):
            raise ValueError(f"`labels` must be from 0 to {classes - 1} or {IGNORED}, but holds {int(wrong[0])}")
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
            return _summed_loss(*inputs, labels, self.padding_ids)
        return _PieceByPiece(*inputs, self.padding_ids).loss_and_gradients(labels, (False, False, False))[0]


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
        rows = rows.index_select(0, _to(rows.device, positions))
    return rows, _to(rows.device, labels)


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    """Copies to a GPU behind what it is doing, while the host goes on, which takes page-locked memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _scores(states: Tensor, weight: Tensor, bias: Tensor | None, padding_ids: int) -> Tensor:
    if states.device.type == "cpu" and states.dtype is torch.float32 and states.shape[:-1].numel() in _FEW_ROWS:
        # As the left factor the weight is read as it lies.
        scores = torch.mm(weight, states.flatten(0, -2).t()).t().contiguous().view(*states.shape[:-1], -1)
        scores = scores if bias is None else scores + bias
    else:
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
        return (slice(start, start + step) for start in range(0, max(1, len(self.states)), step))

    @property
    def scale(self) -> float:
        """What the gradients are multiplied by."""
        return _FP16_SCALE if self.weight.dtype is torch.float16 else 1.0

    def loss_and_gradients(self, labels: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and `scale` times its gradients for states, weight and bias where they are wanted.

        All are of float32 at least. A gradient begins as the first piece's, because a large new tensor of zeros costs
        a CPU more time than a sum.
        """
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias, padding_ids = _aligned(self.weight, self.bias, self.padding_ids)
        total = torch.zeros((), dtype=exact, device=self.states.device)
        of_states = torch.empty_like(self.states, dtype=exact) if wanted[0] else None
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        for rows in self._pieces():
            states = self.states[rows]
            scores = _scores(states, weight, bias, padding_ids)
            total += _turn_into_gradient(scores, labels[rows], self.scale)
            if of_states is not None:
                of_states[rows] = _product(scores, weight, exact)
            if wanted[1]:
                of_weight = _sum(of_weight, _product(scores.t(), states, exact))
            if wanted[2]:
                of_bias = _sum(of_bias, scores.sum(0, dtype=exact))
        of_classes = [None if gradient is None else gradient[: len(self.weight)] for gradient in (of_weight, of_bias)]
        return total, [of_states, *of_classes]


def _aligned(weight: Tensor, bias: Tensor | None, padding_ids: int) -> tuple[Tensor, Tensor | None, int]:
    """The same projection, on tensor cores with so many more padding ids that these run at full speed."""
    more = -len(weight) % _ALIGNED_CLASSES if _runs_on_tensor_cores(weight) else 0
    if not more:
        return weight, bias, padding_ids
    return F.pad(weight, (0, 0, 0, more)), None if bias is None else F.pad(bias, (0, more)), padding_ids + more


def _runs_on_tensor_cores(operand: Tensor) -> bool:
    return operand.is_cuda and operand.itemsize == 2


def _turn_into_gradient(scores: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Overwrites scores (rows, classes) with `scale` times the gradient of their summed cross entropy, and returns it.

    The loss is of float32 at least.
    """
    if _has_kernel(scores):
        from model_center.layer.kernels.cross_entropy import turn_into_gradient  # where there is Triton

        return turn_into_gradient(scores, labels, scale).sum()
    exact = torch.promote_types(scores.dtype, torch.float32)
    total = torch.zeros((), dtype=exact, device=scores.device)
    rows = max(1, _EXACT_SCORES // scores.shape[1])
    for piece, label in zip(scores.split(rows), labels.long()[:, None].split(rows), strict=True):
        logarithms = torch.log_softmax(piece, 1, dtype=exact)
        at_label = logarithms.gather(1, label)
        total -= at_label.sum()
        gradient = logarithms.exp_().scatter_add_(1, label, torch.full_like(at_label, -1))
        piece.copy_(gradient if scale == 1 else gradient.mul_(scale))
    return total


def _has_kernel(scores: Tensor) -> bool:
    return scores.is_cuda and scores.itemsize == 2 and runs_triton(scores.device)


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


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
        ctx.save_for_backward(states, weight, bias, labels)
        ctx.padding_ids = padding_ids
        pieces = _PieceByPiece(states, weight, bias, padding_ids)
        total, ctx.gradients = pieces.loss_and_gradients(labels, ctx.needs_input_grad[:3])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, labels = ctx.saved_tensors
        pieces = _PieceByPiece(states, weight, bias, ctx.padding_ids)
        # They become the parameters' own, so that nothing is copied; a second backward pass computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = pieces.loss_and_gradients(labels, ctx.needs_input_grad[:3])
        factor = upstream / pieces.scale
        own = (
            None if gradient is None else gradient.mul_(factor).to(tensor.dtype)
            for gradient, tensor in zip(gradients, (states, weight, bias), strict=True)
        )
        return *own, None, None


_summed_loss: Callable[..., Tensor] = _SummedLoss.apply
