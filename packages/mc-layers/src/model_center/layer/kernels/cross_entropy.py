"""Cross entropy of scores that are overwritten by its gradient: they are read twice and written once."""

# Triton compiles kernels and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

_TILE, _WARPS = 4096, 8


@triton.jit
def _cross_entropy_kernel(scores_ptr, labels_ptr, losses_ptr, stride, classes, scale, TILE: tl.constexpr):
    """Loss and gradient of one row, with an online softmax."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * stride
    largest, total = float("-inf"), 0.0
    for start in range(0, classes, TILE):
        places = start + tl.arange(0, TILE)
        scores = tl.load(scores_ptr + places, mask=places < classes, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        # As long as all classes are padding there is nothing to subtract.
        offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - offset) + tl.sum(tl.exp(scores - offset), 0)
        largest = new_largest
    log_sum = largest + tl.log(total)
    label = tl.load(labels_ptr + row)
    is_class = (label >= 0) & (label < classes)
    at_label = tl.load(scores_ptr + label, mask=is_class, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, log_sum - at_label)
    for start in range(0, classes, TILE):
        places = start + tl.arange(0, TILE)
        inside = places < classes
        scores = tl.load(scores_ptr + places, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(scores - log_sum) - tl.where(places == label, 1.0, 0.0)) * scale
        tl.store(scores_ptr + places, gradient.to(scores_ptr.dtype.element_ty), mask=inside)


def turn_into_gradient(scores: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """Overwrites scores with `scale` times the gradient of their cross entropy.

    Args:
        scores: (rows, classes), float16 or bfloat16, each row in one piece; minus infinity where nothing is a class.
        labels: (rows,), a class for each row; the loss is NaN where it is none.
        scale: Factor of the gradient.

    Returns:
        The cross entropy of each row, (rows,), float32.
    """
    rows, classes = scores.shape
    losses = torch.empty(rows, dtype=torch.float32, device=scores.device)
    if rows:
        _cross_entropy_kernel[(rows,)](
            scores, labels, losses, scores.stride(0), classes, scale, TILE=_TILE, num_warps=_WARPS
        )
    return losses
