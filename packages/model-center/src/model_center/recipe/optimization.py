"""Optimizer, schedule and loss scale of a training recipe."""

import math
from typing import Any

import torch

from model_center.engine.lr_scheduler import Cosine, Linear, Noam, NoDecay, WarmupLRScheduler
from model_center.engine.optim import AdamOffloadOptimizer, AdamOptimizer

from .configuration import OptimizerOptions, require

FLOAT16_LOSS_SCALE = 2.0**16


def make_optimizer(model: torch.nn.Module, options: OptimizerOptions) -> AdamOptimizer:
    """Return AdamW over all parameters of the model."""
    optimizer_class = AdamOffloadOptimizer if options.offload else AdamOptimizer
    return optimizer_class(
        model.parameters(),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
    )


def warmup_of(options: OptimizerOptions, total_steps: int) -> int:
    """Return the steps over which the learning rate of a run of `total_steps` steps rises.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    warmup = round(options.warmup_ratio * total_steps) if options.warmup_steps is None else options.warmup_steps
    require(warmup <= total_steps, "optimizer.warmup_steps", f"at most the run's {total_steps} steps", warmup)
    return warmup


def make_scheduler(optimizer: torch.optim.Optimizer, options: OptimizerOptions, total_steps: int) -> WarmupLRScheduler:
    """Return the schedule for a run of `total_steps` steps, every one of which has a positive learning rate.

    Raises:
        ValueError: as `warmup_of`.
    """
    classes: dict[str, type[Any]] = {"linear": Linear, "cosine": Cosine, "noam": Noam, "constant": NoDecay}
    warmup = warmup_of(options, total_steps)
    rate = options.learning_rate
    if options.schedule == "noam":
        rate *= math.sqrt(max(1, warmup))  # the engine's start_lr is its highest rate times this
    # From 1 to below total_steps + 1: the rate is zero at either end of a schedule, and a step with it would be wasted.
    scheduler: WarmupLRScheduler = classes[options.schedule](optimizer, rate, warmup, total_steps + 1, num_iter=1)
    return scheduler


def loss_scale_for(model: torch.nn.Module) -> float | None:
    """Return the loss scale to begin with: gradients of float16 weights underflow without one."""
    return FLOAT16_LOSS_SCALE if any(weight.dtype == torch.float16 for weight in model.parameters()) else None
