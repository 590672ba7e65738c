"""Lists of tensors, as PyTorch's multi-tensor kernels want them."""

from collections.abc import Sequence
from typing import TypeVar

import torch

TensorT = TypeVar("TensorT", bound=torch.Tensor)


def group_by_kind(tensors: Sequence[TensorT]) -> list[list[TensorT]]:
    """Splits tensors by device and data type: on mixed lists the multi-tensor kernels fall back to one by one."""
    groups: dict[tuple[torch.device, torch.dtype], list[TensorT]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())
