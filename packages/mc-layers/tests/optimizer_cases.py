"""Both optimizers, and small parameters for them."""

from typing import Any

import torch

from model_center.engine.optim import AdamOffloadOptimizer, AdamOptimizer

OPTIMIZERS: list[Any] = [AdamOptimizer, AdamOffloadOptimizer]
HALVES = [torch.float16, torch.bfloat16]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (3,), (2, 3, 4)]
    return [torch.nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in shapes]


def give_gradients(targets: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> None:
    source = torch.Generator().manual_seed(100 + step)
    for target in targets:
        target.grad = (torch.randn(target.shape, generator=source) * scale).to(target.dtype)


def masters_of(optimizer: Any) -> list[torch.Tensor]:
    return [state["master"] for state in optimizer.state_dict()["state"].values()]
