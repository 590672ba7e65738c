"""Triton kernels that go once over the memory of a large half-precision parameter."""

# Triton compiles kernels and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_TILE = 2048


@triton.jit
def _update_kernel(
    parameter_ptr, gradient_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, corrections_ptr, elements,
    lr, decay, rest1, beta2, rest2, eps, scale, TILE: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = places < elements
    gradient = tl.load(gradient_ptr + places, mask=inside, other=0.0).to(tl.float32) / scale
    master = tl.load(master_ptr + places, mask=inside, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + places, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + places, mask=inside, other=0.0)
    exp_avg += rest1 * (gradient - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * gradient * gradient
    master -= decay * master
    root = tl.sqrt(exp_avg_sq) / tl.load(corrections_ptr + 1)
    master -= lr / tl.load(corrections_ptr) * exp_avg / (root + eps)
    tl.store(exp_avg_ptr + places, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + places, exp_avg_sq, mask=inside)
    tl.store(master_ptr + places, master, mask=inside)
    tl.store(parameter_ptr + places, master.to(parameter_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(gradient_ptr, factor_ptr, elements, TILE: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = places < elements
    gradient = tl.load(gradient_ptr + places, mask=inside, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(gradient_ptr + places, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def multiply(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies contiguous gradients, in place, by a float32 scalar on their device.

    PyTorch's multi-tensor multiplication does not take a scalar of another type.
    """
    for gradient in gradients:
        elements = gradient.numel()
        _scale_kernel[(triton.cdiv(elements, _TILE),)](gradient, factor, elements, TILE=_TILE)


def update(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: list[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
) -> None:
    """Updates parameters, masters, moments and steps as PyTorch's fused AdamW does, up to the rounding of float32.

    It reads and writes 28 bytes an element, where conversion of gradients, update and rounding of masters one after
    the other take 46.

    Args:
        parameters: Float16 or bfloat16; they, their gradients, masters and moments are contiguous and of equal sizes.
        gradients: Of the parameters' type, `scale` times as large as they should be.
        masters: Float32, what parameters are rounded from.
        exp_avgs: Float32, running means of gradients.
        exp_avg_sqs: Float32, running means of their squares.
        steps: Float32 scalars: updates before this one.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Part of a parameter that a step with learning rate 1 takes away.
        scale: The loss scale that gradients carry.
    """
    torch._foreach_add_(steps, 1)
    counted = torch.stack(steps).double()  # float32 would lose most digits of the first steps' corrections
    corrections = torch.stack((1 - betas[0] ** counted, (1 - betas[1] ** counted).sqrt()), -1).float()
    tensors = zip(parameters, gradients, masters, exp_avgs, exp_avg_sqs, corrections, strict=True)
    for operands in tensors:
        elements = operands[0].numel()
        _update_kernel[(triton.cdiv(elements, _TILE),)](
            *operands, elements, lr, lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1], eps, scale, TILE=_TILE
        )
