"""Learning-rate schedules: a linear warm-up, then a decay. Names, arguments and state are BMTrain's.

The learning rate is a function of the iteration alone, so a schedule resumes from any iteration exactly. The rate of
iteration `num_iter` is set on construction (or by `load_state_dict`); `step` goes to the next iteration.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch


class WarmupLRScheduler(ABC):
    """Base of all schedules: sets one learning rate on all parameter groups of an optimizer.

    Args:
        optimizer: Its parameter groups' "lr" is set.
        start_lr: The learning rate that the warm-up leads to, not negative.
        warmup_iter: Number of warm-up iterations; the rate of iteration 0 is 0 unless there are none.
        end_iter: Iteration at which the decay ends, where it has an end; otherwise ignored, by custom -1.
        num_iter: The current iteration, for training that resumes.

    Attributes:
        num_iter: The current iteration.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, start_lr: float, warmup_iter: int, end_iter: int, num_iter: int = 0
    ) -> None:
        self.optimizer = optimizer
        self.start_lr = start_lr
        self.warmup_iter = warmup_iter
        self.end_iter = end_iter
        self.num_iter = num_iter
        self.step(num_iter)

    @abstractmethod
    def get_lr_decay(self, num_iter: int) -> float:
        """Learning rate of an iteration after the warm-up."""

    def get_lr_warmup(self, num_iter: int) -> float:
        """Learning rate of an iteration of the warm-up."""
        return self.start_lr * num_iter / self.warmup_iter

    def get_lr(self) -> float:
        """Learning rate of the current iteration."""
        if self.num_iter < self.warmup_iter:
            return self.get_lr_warmup(self.num_iter)
        return self.get_lr_decay(self.num_iter)

    @property
    def current_lr(self) -> float:
        """The learning rate that is set."""
        return self._current_lr

    def step(self, num_iter: int | None = None) -> None:
        """Goes to an iteration and sets its learning rate.

        Args:
            num_iter: The iteration; the next one if not given.

        Raises:
            ValueError: If it is negative.
        """
        self.num_iter = self.num_iter + 1 if num_iter is None else num_iter
        self._check()
        self._current_lr = self.get_lr()
        for group in self.optimizer.param_groups:
            group["lr"] = self._current_lr

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on from here."""
        return {name: value for name, value in vars(self).items() if name not in ("optimizer", "_current_lr")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes to the iteration of a saved schedule, and on with its arguments.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If an entry is missing, unknown (nothing is changed then) or out of range.
        """
        expected = self.state_dict()
        if state_dict.keys() != expected.keys():
            raise ValueError(
                f"the state of a {type(self).__name__} schedule must hold {sorted(expected)}, "
                f"but holds {sorted(state_dict)}"
            )
        vars(self).update(state_dict)
        self.step(self.num_iter)

    def _check(self) -> None:
        if not (math.isfinite(self.start_lr) and self.start_lr >= 0):
            raise ValueError(f"`start_lr` must be a finite number of at least 0, but is {self.start_lr}")
        if self.warmup_iter < 0:
            raise ValueError(f"`warmup_iter` must be at least 0, but is {self.warmup_iter}")
        if self.num_iter < 0:
            raise ValueError(f"`num_iter` must be at least 0, but is {self.num_iter}")


class _EndingLRScheduler(WarmupLRScheduler):
    """A schedule that reaches 0 at `end_iter` and stays there."""

    def get_progress(self, num_iter: int) -> float:
        """How much of the decay is over, from 0 to 1."""
        return min(1.0, (num_iter - self.warmup_iter) / (self.end_iter - self.warmup_iter))

    def _check(self) -> None:
        super()._check()
        if self.end_iter <= self.warmup_iter:
            raise ValueError(
                f"`end_iter` must be greater than `warmup_iter` ({self.warmup_iter}), but is {self.end_iter}"
            )


class Noam(WarmupLRScheduler):
    """Inverse square root: `start_lr * num_iter / warmup_iter ** 1.5`, then `start_lr / num_iter ** 0.5`.

    Source: Vaswani et al. 2017, section 5.3. The highest rate is `start_lr / warmup_iter ** 0.5`.
    """

    def get_lr_warmup(self, num_iter: int) -> float:
        """Rises to `start_lr / warmup_iter ** 0.5`."""
        return self.start_lr / math.sqrt(self.warmup_iter) * num_iter / self.warmup_iter

    def get_lr_decay(self, num_iter: int) -> float:
        """`start_lr / num_iter ** 0.5` (without warm-up, iteration 0 counts as 1)."""
        return self.start_lr / math.sqrt(max(1, num_iter))


class Linear(_EndingLRScheduler):
    """Falls linearly from `start_lr` to 0 at `end_iter`."""

    def get_lr_decay(self, num_iter: int) -> float:
        """`start_lr * (end_iter - num_iter) / (end_iter - warmup_iter)`, at least 0."""
        return self.start_lr * (1 - self.get_progress(num_iter))


class Cosine(_EndingLRScheduler):
    """Falls along half a cosine from `start_lr` to 0 at `end_iter`, and stays there (in BMTrain it rises again).

    Source: Loshchilov and Hutter 2017, one period.
    """

    def get_lr_decay(self, num_iter: int) -> float:
        """`start_lr * (1 + cos(pi * progress)) / 2`."""
        return self.start_lr * (1 + math.cos(math.pi * self.get_progress(num_iter))) / 2


class Exponential(WarmupLRScheduler):
    """Falls by the same factor every iteration.

    Args:
        optimizer: See `WarmupLRScheduler`, as for the next four.
        start_lr: The learning rate that the warm-up leads to.
        warmup_iter: Number of warm-up iterations.
        end_iter: Ignored; the decay has no end.
        num_iter: The current iteration.
        gamma: The factor, above 0 and at most 1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start_lr: float,
        warmup_iter: int,
        end_iter: int,
        num_iter: int = 0,
        gamma: float = 0.95,
    ) -> None:
        self.gamma = gamma
        super().__init__(optimizer, start_lr, warmup_iter, end_iter, num_iter)

    def get_lr_decay(self, num_iter: int) -> float:
        """`start_lr * gamma ** (num_iter - warmup_iter)`."""
        return self.start_lr * math.pow(self.gamma, num_iter - self.warmup_iter)

    def _check(self) -> None:
        super()._check()
        if not 0 < self.gamma <= 1:
            raise ValueError(f"`gamma` must be above 0 and at most 1, but is {self.gamma}")


class NoDecay(WarmupLRScheduler):
    """Stays at `start_lr` after the warm-up."""

    def get_lr_decay(self, num_iter: int) -> float:  # noqa: ARG002
        """`start_lr`."""
        return self.start_lr
