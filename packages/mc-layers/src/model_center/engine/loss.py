"""Losses that are correct in half precision and lean in memory."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

Reduction = Literal["none", "mean", "sum"]

# Rows are processed in pieces of this many float32 elements (64 MiB), so that no float32 copy of all logits exists.
PIECE_ELEMENTS = 2**24


class FusedCrossEntropy(torch.nn.Module):
    """Cross entropy between logits and class indices.

    Logits of any floating-point type are turned into float32 piece by piece (float64 stays), so half-precision logits
    neither overflow nor are copied as a whole: backward computes their softmax again. Classes whose logit is minus
    infinity (vocabulary padding) cannot be reached and get no part of the label smoothing.

    Args:
        weight: Weight of each class, shape (num_classes,); 1 if not given.
        ignore_index: Rows with this target count nothing.
        reduction: "none" (one loss a row), "sum", or "mean" (the sum over the weights of the targets that count; 0 if
            none does, where `torch.nn.functional.cross_entropy` gives NaN).
        label_smoothing: Part of the target, from 0 to 1, that is spread evenly over the reachable classes.

    Raises:
        ValueError: If an option is out of range.
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise ValueError(f"`reduction` must be one of {', '.join(get_args(Reduction))}, but is {reduction!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` must be from 0 to 1, but is {label_smoothing}")
        if weight is not None and weight.dim() != 1:
            raise ValueError(f"`weight` must be of shape (num_classes,), but is of shape {tuple(weight.shape)}")
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Computes the loss.

        Args:
            input: Logits, shape (rows, num_classes).
            target: Class indices or `ignore_index`, shape (rows,).

        Returns:
            Scalar, or shape (rows,) if the reduction is "none"; float32 (float64 for float64 logits).

        Raises:
            ValueError: If shapes, types or (on the CPU) target indices do not fit.
        """
        self._check(input, target)
        counts = target != self.ignore_index
        target = target.masked_fill(~counts, 0).long()  # as indices bytes would be a mask
        row_weight = counts.to(torch.promote_types(input.dtype, torch.float32))
        weight = None if self.weight is None else self.weight.to(row_weight)
        if weight is not None:
            row_weight = row_weight * weight[target]
        losses = _cross_entropy(input, target, row_weight, counts, weight, self.label_smoothing)
        if self.reduction == "none":
            return losses
        total = losses.sum()
        if self.reduction == "sum":
            return total
        divisor = row_weight.sum()
        return total / torch.where(divisor == 0, 1, divisor)

    def _check(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        if logits.dim() != 2 or target.shape != logits.shape[:1]:
            raise ValueError(
                "`input` must be of shape (rows, num_classes) and `target` of shape (rows,), "
                f"but they are {tuple(logits.shape)} and {tuple(target.shape)}"
            )
        if not logits.is_floating_point():
            raise ValueError(f"`input` must be of a floating-point type, but is {logits.dtype}")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(f"`target` must hold integer class indices, but is {target.dtype}")
        num_classes = logits.shape[1]
        if self.weight is not None and len(self.weight) != num_classes:
            raise ValueError(
                f"`weight` must have one entry for each of {num_classes} classes, but has {len(self.weight)}"
            )
        # On a GPU this would make the host wait; there the indexing kernel itself fails.
        if target.device.type == "cpu":
            wrong = target[(target != self.ignore_index) & ((target < 0) | (target >= num_classes))]
            if len(wrong):
                raise ValueError(
                    f"`target` must be from 0 to {num_classes - 1} or {self.ignore_index}, but holds {int(wrong[0])}"
                )


class _CrossEntropy(torch.autograd.Function):
    """Loss of each row: with smoothing e, the target's part (1 - e) and a share of all reachable classes."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        row_weight: torch.Tensor,
        counts: torch.Tensor,
        weight: torch.Tensor | None,
        smoothing: float,
    ) -> torch.Tensor:
        target = target.long().unsqueeze(1)
        losses = torch.empty_like(row_weight)
        for rows in _pieces(logits):
            log_probability = torch.log_softmax(logits[rows], 1, dtype=losses.dtype)
            at_target = log_probability.gather(1, target[rows]).squeeze(1)
            losses[rows] = (smoothing - 1) * row_weight[rows] * at_target
            if smoothing:
                share = _smooth_share(logits[rows], weight, smoothing, losses.dtype)
                # Unreachable classes have share 0, and 0 times infinity is not 0.
                losses[rows] -= (share * log_probability.masked_fill_(logits[rows] == -torch.inf, 0)).sum(1)
        ctx.save_for_backward(logits, target, row_weight, counts, weight)
        ctx.smoothing = smoothing
        return losses.masked_fill_(~counts, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, target, row_weight, counts, weight = ctx.saved_tensors
        upstream = grad_output.unsqueeze(1)
        of_target = upstream * ((1 - ctx.smoothing) * row_weight).unsqueeze(1)
        gradient = torch.empty_like(logits)
        for rows in _pieces(logits):
            piece = torch.softmax(logits[rows], 1, dtype=grad_output.dtype)
            if ctx.smoothing:
                share = upstream[rows] * _smooth_share(logits[rows], weight, ctx.smoothing, piece.dtype)
                piece.mul_(of_target[rows] + share.sum(1, keepdim=True)).sub_(share)
            else:
                piece.mul_(of_target[rows])
            gradient[rows] = piece.scatter_add_(1, target[rows], -of_target[rows])
        # Not by a factor of 0: ignored rows may hold infinities.
        return gradient.masked_fill_(~counts.unsqueeze(1), 0), None, None, None, None, None


_cross_entropy: Callable[..., torch.Tensor] = _CrossEntropy.apply


def _pieces(logits: torch.Tensor) -> list[slice]:
    rows, num_classes = logits.shape
    step = max(1, PIECE_ELEMENTS // max(1, num_classes))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _smooth_share(
    logits: torch.Tensor, weight: torch.Tensor | None, smoothing: float, dtype: torch.dtype
) -> torch.Tensor:
    """What each class gets of the smoothed part of a row's target, (rows, num_classes)."""
    reachable = (logits != -torch.inf).to(dtype)
    share = smoothing * reachable / reachable.sum(1, keepdim=True).clamp_min(1)
    return share if weight is None else share * weight
