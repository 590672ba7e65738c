"""Lists of tensors, as PyTorch's multi-tensor kernels want them."""

import importlib.util
import logging
import math
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import TypeVar, cast

import torch

TensorT = TypeVar("TensorT", bound=torch.Tensor)

_OLDEST_GPU = (8, 0)
_is_on_gpu = attrgetter("is_cuda")
_logger = logging.getLogger(__name__)


def fits_one_pass(*tensors: torch.Tensor) -> bool:
    """Whether kernels that go once over memory take these, the first of which is of half precision."""
    # Asked of each parameter in each step, so without loops of Python's own.
    suits = tensors[0].itemsize == 2 and all(map(_is_on_gpu, tensors)) and runs_triton(tensors[0].device)
    return suits and all(map(torch.Tensor.is_contiguous, tensors))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements, in whatever order, lie in memory without gaps; those of a slice do not."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether optimizers and losses have kernels of ours on a GPU. If not, it is logged once why."""
    obstacle = triton_obstacle(device)
    if obstacle is not None:
        _logger.warning("optimizers and losses run without their fast kernels on %s, because %s", device, obstacle)
    return obstacle is None


def triton_obstacle(device: torch.device) -> str | None:
    """What keeps Triton's kernels from running on a GPU."""
    if torch.version.hip is not None:
        return "the GPU is not one of NVIDIA's"
    if not has_triton():
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_GPU:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, less than 8.0"
    return None


def has_triton() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("triton") is not None


def group_by_kind(tensors: Sequence[TensorT]) -> list[list[TensorT]]:
    """Splits tensors by device and data type: on mixed lists the multi-tensor kernels fall back to one by one."""
    groups: dict[tuple[torch.device, torch.dtype], list[TensorT]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def local_norm(tensors: Sequence[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    """Norm of all tensors of this process as one vector, without overflow and without waiting for the device.

    Args:
        tensors: Any shapes and floating-point types; empty ones count nothing.
        norm_type: Order of the norm, above 0.
        device: Where the result is if there are no tensors.

    Returns:
        Float32 scalar.
    """
    groups = group_by_kind([tensor for tensor in tensors if tensor.numel()])
    if not groups:
        return torch.zeros((), device=device)
    norms = [_norms(group, norm_type) for group in groups]
    stacked = torch.cat([norm.to(norms[0].device, torch.float32) for norm in norms])
    return cast(torch.Tensor, torch.linalg.vector_norm(stacked, norm_type))


def _norms(tensors: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Norms of parts of tensors of one kind; the norm of these is that of all."""
    if norm_type in (2, math.inf) and all(map(fits_one_pass, tensors)):
        from model_center.engine.optim import kernels  # where there is Triton

        return kernels.norms(tensors, largest=norm_type == math.inf)
    # A norm of float16 values often exceeds what float16 holds, so that its result type must be asked for.
    result_type = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, norm_type, dtype=result_type))
