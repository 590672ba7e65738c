"""What the kernels need; everything else computes attention the plain way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from model_center.engine.tensors import has_triton, triton_obstacle

_HALF_TYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 128
_MOST_HEADS = 65_535
"""Of all sequences together: each has a row of programs, and CUDA's grids have no more rows."""

_logger = logging.getLogger(__name__)
_meta_is_gpu: ContextVar[bool] = ContextVar("_meta_is_gpu", default=False)


@contextmanager
def meta_stands_for_gpu() -> Iterator[None]:
    """Let tensors without data, on the meta device, take the way of those on a current GPU: to see what that needs."""
    token = _meta_is_gpu.set(True)
    try:
        yield
    finally:
        _meta_is_gpu.reset(token)


def fused_kernels_take(x: Tensor, dim_head: int, heads: int) -> bool:
    """Return whether heads of size `dim_head` with the device and (under autocast) type of `x` suit the kernels.

    If not, that is logged, once for each reason.

    Args:
        x: Queries, or the hidden states that they are made of.
        dim_head: Size of each head.
        heads: Number of heads of queries of all sequences together.
    """
    dtype = x.dtype
    if x.device.type == "meta":
        suits = _meta_is_gpu.get() and dtype in _HALF_TYPES and dim_head <= _LARGEST_HEAD and has_triton()
        return suits and heads <= _MOST_HEADS
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return _suit(x.device, dtype, dim_head) and fused_kernels_launch(heads)


def fused_kernels_launch(heads: int) -> bool:
    """Return whether one call of the kernels may have so many heads, those of all sequences together.

    If not, that is logged once.
    """
    if heads > _MOST_HEADS:
        _tell_of_heads()
        return False
    return True


def _suit(device: torch.device, dtype: torch.dtype, dim_head: int) -> bool:
    obstacle = _obstacle(device, dtype, dim_head)
    if obstacle is not None:
        _tell(obstacle, logging.INFO if device.type == "cpu" else logging.WARNING)
    return obstacle is None


def _tell_of_heads() -> None:
    # Without their number, which changes from batch to batch and would be told each time.
    _tell(f"a batch has more than {_MOST_HEADS} heads, those of all its sequences together", logging.WARNING)


# Compiled models need not look inside. `torch.compiler.assume_constant_result` does the same, but imports the compiler,
# which takes seconds, when it is called.
_suit._dynamo_marked_constant = True  # type: ignore[attr-defined]
_tell_of_heads._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _obstacle(device: torch.device, dtype: torch.dtype, dim_head: int) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}, not an NVIDIA GPU"
    if (obstacle := triton_obstacle(device)) is not None:
        return obstacle
    if dtype not in _HALF_TYPES:
        return f"the data type is {dtype}, neither float16 nor bfloat16"
    if dim_head > _LARGEST_HEAD:
        return f"`dim_head` is {dim_head}, greater than {_LARGEST_HEAD}"
    return None


@cache
def _tell(obstacle: str, level: int) -> None:
    _logger.log(level, "attention writes out position biases and masks of packed documents, because %s", obstacle)
