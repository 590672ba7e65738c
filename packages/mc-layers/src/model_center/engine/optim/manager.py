"""One training step: overflow check, optimizers, schedules, loss scale. In both generations of BMTrain's interface."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from model_center.engine.current import current_engine
from model_center.engine.optim.adam import AdamOptimizer
from model_center.engine.optim.clip import clip_grad_norm
from model_center.engine.optim.loss_scale import LossScaler, gradients_of
from model_center.engine.tensors import group_by_kind


class Schedule(Protocol):
    """What a learning-rate schedule must do: those of `lr_scheduler` and of `torch.optim.lr_scheduler` do."""

    def step(self) -> None:
        """Goes to the next iteration."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes."""


def optim_step(optimizer: torch.optim.Optimizer, lr_scheduler: Schedule | None = None) -> bool:
    """One step of an optimizer and its schedule, after `backward` of `optimizer.loss_scale(loss)`.

    If a scaled gradient overflowed, the step is skipped, gradients are cleared and the loss scale shrinks.

    Args:
        optimizer: `AdamOptimizer`, `AdamOffloadOptimizer`, or any optimizer of PyTorch (whose loss was not scaled).
        lr_scheduler: Its schedule.

    Returns:
        Whether parameters were updated.
    """
    scaler = optimizer.scaler if isinstance(optimizer, AdamOptimizer) else LossScaler(1.0, enabled=False)
    return _step([optimizer], [lr_scheduler], scaler)


class OptimManager:
    """Steps several optimizers that share one loss scale.

        manager = OptimManager(loss_scale=1024)
        manager.add_optimizer(optimizer, lr_scheduler)
        manager.zero_grad()
        manager.backward(loss)
        manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        manager.step()

    Args:
        loss_scale: Initial loss scale, which then adapts; without one the loss is not scaled.
        loss_scale_factor: What the scale shrinks and grows by, above 1.
        loss_scale_steps: Number of good steps in a row after which it grows.
        min_loss_scale: It does not fall below this.
        max_loss_scale: It does not grow above this.
        grad_scale: What the loss is divided by before backward; by default what the engine needs for the gradients of
            all processes to average.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        loss_scale: float | None = None,
        loss_scale_factor: float = 2,
        loss_scale_steps: int = 1024,
        min_loss_scale: float = 1,
        max_loss_scale: float = math.inf,
        grad_scale: float | None = None,
    ) -> None:
        self.scaler = LossScaler(
            1.0 if loss_scale is None else loss_scale,
            enabled=loss_scale is not None,
            factor=loss_scale_factor,
            steps=loss_scale_steps,
            minimum=min_loss_scale,
            maximum=max_loss_scale,
        )
        self.grad_scale = current_engine().gradient_divisor if grad_scale is None else grad_scale
        if not self.grad_scale > 0:
            raise ValueError(f"`grad_scale` must be above 0, but is {grad_scale}")
        self.optimizers: list[torch.optim.Optimizer] = []
        self.lr_schedulers: list[Schedule | None] = []

    @property
    def loss_scale(self) -> float:
        """The loss scale now."""
        return self.scaler.scale

    @property
    def loss_scale_enabled(self) -> bool:
        """Whether the loss scale adapts and gradients are checked."""
        return self.scaler.enabled

    def add_optimizer(self, optimizer: torch.optim.Optimizer, lr_scheduler: Schedule | None = None) -> None:
        """Adds an optimizer (any of PyTorch's or ours) and its schedule."""
        self.optimizers.append(optimizer)
        self.lr_schedulers.append(lr_scheduler)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call `backward` on."""
        return loss * (self.loss_scale / self.grad_scale)

    def backward(self, loss: torch.Tensor) -> None:
        """Computes the gradients of the scaled loss."""
        self.scale_loss(loss).backward()

    def zero_grad(self) -> None:
        """Clears the gradients of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def clip_grad_norm(
        self,
        param_groups: Iterable[Mapping[str, Any]],
        max_norm: float,
        norm_type: float | str = 2,
        eps: float = 1e-6,
    ) -> torch.Tensor:
        """`clip_grad_norm` for gradients that carry this manager's loss scale."""
        return clip_grad_norm(param_groups, max_norm, norm_type, scale=self.loss_scale, eps=eps)

    def step(self) -> bool:
        """Steps all optimizers and schedules.

        If any gradient overflowed, all steps are skipped, gradients are cleared and the loss scale shrinks.

        Returns:
            Whether parameters were updated.
        """
        return _step(self.optimizers, self.lr_schedulers, self.scaler)

    def state_dict(self) -> dict[str, Any]:
        """State of all optimizers and schedules and of the loss scale: all that training needs to go on bit by bit."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "lr_schedulers": [scheduler and scheduler.state_dict() for scheduler in self.lr_schedulers],
            "loss_scale": self.loss_scale,
            "loss_scale_enabled": self.loss_scale_enabled,
            "steps_since_last_scale": self.scaler.steps_since_change,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; a manager that scales the loss keeps its scale if the saved one did not.

        Args:
            state_dict: State of a manager with the same optimizers and schedules, in the same order.

        Raises:
            ValueError: If the number of optimizers or the places of schedules differ.
        """
        schedules = [state is not None for state in state_dict["lr_schedulers"]]
        if schedules != (expected := [scheduler is not None for scheduler in self.lr_schedulers]):
            raise ValueError(
                "the state must be of a manager with the same optimizers and schedules: whether each optimizer has a "
                f"schedule is {expected} here, but {schedules} there"
            )
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for scheduler, state in zip(self.lr_schedulers, state_dict["lr_schedulers"], strict=True):
            if scheduler is not None:
                scheduler.load_state_dict(state)
        self.scaler = self.scaler.resumed(
            state_dict["loss_scale"], state_dict["steps_since_last_scale"], enabled=state_dict["loss_scale_enabled"]
        )


def _step(
    optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Schedule | None], scaler: LossScaler
) -> bool:
    engine = current_engine()
    groups = _groups_of(optimizers)
    engine.before_update_of(groups)
    if scaler.overflows(groups):
        scaler.failed()
        for optimizer in optimizers:
            optimizer.zero_grad()
        return False
    for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
        if isinstance(optimizer, AdamOptimizer):
            optimizer.step(scale=scaler.scale)
        else:
            if scaler.scale != 1:
                for gradients in group_by_kind([engine.local(each) for each in gradients_of(optimizer.param_groups)]):
                    torch._foreach_div_(gradients, scaler.scale)
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
    engine.after_update()
    scaler.succeeded()
    return True


def _groups_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]
