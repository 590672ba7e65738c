"""Collectives with BMTrain's names. In a single process they return their input."""

from typing import get_args

import torch

from model_center.engine.base import ReduceOp
from model_center.engine.current import current_engine


def all_reduce(x: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
    """Reduces a tensor over all processes.

    Args:
        x: Any shape, the same on every process.
        op: "sum", "avg", "max", "min" or "prod".

    Returns:
        The reduced tensor, of the shape of `x`.

    Raises:
        ValueError: If `op` is none of these.
    """
    if op not in get_args(ReduceOp):
        raise ValueError(f"`op` must be one of {', '.join(get_args(ReduceOp))}, but is {op!r}")
    return current_engine().all_reduce(x, op)


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """Gathers the tensors (...) of all processes into one (world_size, ...)."""
    return current_engine().all_gather(x)


def broadcast(src: torch.Tensor, root: int = 0) -> torch.Tensor:
    """The tensor of one process, on all of them.

    Args:
        src: Any shape, the same on every process.
        root: Number of the process whose values all get.

    Raises:
        ValueError: If there is no such process.
    """
    engine = current_engine()
    if not 0 <= root < engine.world_size:
        raise ValueError(f"`root` must be from 0 to {engine.world_size - 1}, but is {root}")
    return engine.broadcast(src, root)
