"""Gradient clipping by the norm of all gradients together."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from model_center.engine.current import current_engine
from model_center.engine.optim.loss_scale import gradients_of
from model_center.engine.tensors import fits_one_pass, group_by_kind


@torch.no_grad()
def clip_grad_norm(
    param_groups: Iterable[Mapping[str, Any]],
    max_norm: float,
    norm_type: float | str = 2,
    scale: float = 1.0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Shrinks all gradients by one factor so that their norm, seen as one vector, is at most `max_norm`.

    The host does not wait for the device. If the norm is not finite the gradients are left as they are, so that the
    step's overflow check sees them.

    Args:
        param_groups: Parameter groups of an optimizer; the gradients of all processes count.
        max_norm: The largest norm, of gradients without loss scale.
        norm_type: Order of the norm, above 0; infinity or "inf" for the largest absolute value.
        scale: The loss scale that the gradients still carry.
        eps: Added to the norm before dividing by it.

    Returns:
        The norm before clipping, without loss scale: float32 scalar.

    Raises:
        ValueError: If `max_norm`, `norm_type` or `scale` is not above 0.
    """
    order = float(norm_type)
    for name, value in (("max_norm", max_norm), ("norm_type", order), ("scale", scale)):
        if not value > 0:
            raise ValueError(f"`{name}` must be above 0, but is {value}")
    engine = current_engine()
    groups = list(param_groups)
    engine.before_update_of(groups)
    gradients = gradients_of(groups)
    norm = engine.total_norm(gradients, order) / scale
    factor = torch.where(norm.isfinite(), (max_norm / (norm + eps)).clamp(max=1.0), 1.0)
    in_one_pass: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for gradient in map(engine.local, gradients):
        (in_one_pass if fits_one_pass(gradient) else others).append(gradient)
    if in_one_pass:
        from model_center.engine.optim import kernels  # where there is Triton

        kernels.multiply(in_one_pass, factor)
    for group in group_by_kind(others):
        if group[0].itemsize > 2:
            torch._foreach_mul_(group, factor.to(group[0].device))
        else:  # which would round the factor to half precision on a GPU
            for gradient in group:
                gradient.copy_(gradient.float() * factor.to(gradient.device))
    return norm
