"""Collectives of torch.distributed that gradients pass through.

Gradients are those of BMTrain: a result is taken to be used by each process for a loss of its own, and backward
gives that process's part only, without communication, except for `broadcast`, whose source gets the sum.
"""

from typing import Any, cast

import torch
import torch.distributed as dist

from model_center.engine.base import ReduceOp

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "prod": dist.ReduceOp.PRODUCT,
}


def all_reduce(tensor: torch.Tensor, op: ReduceOp, device: torch.device) -> torch.Tensor:
    """`tensor` reduced over all processes; communicated from `device`, returned where it was."""
    return cast(torch.Tensor, _AllReduce.apply(tensor, op, device))  # type: ignore[no-untyped-call]


def all_gather(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensors (...) of all processes as (world_size, ...); likewise."""
    return cast(torch.Tensor, _AllGather.apply(tensor, device))  # type: ignore[no-untyped-call]


def broadcast(tensor: torch.Tensor, root: int, device: torch.device) -> torch.Tensor:
    """The tensor of process `root`; likewise."""
    return cast(torch.Tensor, _Broadcast.apply(tensor, root, device))  # type: ignore[no-untyped-call]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, op: ReduceOp, device: torch.device) -> torch.Tensor:
        reduced = _sendable(tensor, device)
        if tensor.is_floating_point():  # the sum of half-precision values may leave their range where the mean does not
            reduced = reduced.to(torch.promote_types(tensor.dtype, torch.float32))
        dist.all_reduce(reduced, _OPERATIONS[op])
        if op == "avg":
            reduced.div_(dist.get_world_size(), rounding_mode=None if tensor.is_floating_point() else "floor")
        result = reduced.to(tensor.device, tensor.dtype)
        ctx.op = op
        if op in ("max", "min"):
            ctx.save_for_backward(tensor == result)
        elif op == "prod":
            ctx.save_for_backward(result / tensor)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        if ctx.op == "avg":
            gradient = gradient / dist.get_world_size()
        elif ctx.op != "sum":
            gradient = gradient * ctx.saved_tensors[0]
        return gradient, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:  # noqa: ARG004
        sent = _sendable(tensor, device)
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, sent)
        return torch.stack(parts).to(tensor.device, tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # noqa: ARG004
        return gradients[0][dist.get_rank()], None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, root: int, device: torch.device) -> torch.Tensor:
        ctx.root, ctx.device = root, device
        sent = _sendable(tensor, device)
        dist.broadcast(sent, root)
        return sent.to(tensor.device, tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        total = all_reduce(gradients[0], "sum", ctx.device)
        return (total if dist.get_rank() == ctx.root else torch.zeros_like(total)), None, None


def _sendable(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A contiguous copy of a type that all backends know."""
    dtype = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
    return tensor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
