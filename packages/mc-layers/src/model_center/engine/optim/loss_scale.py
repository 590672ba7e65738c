"""Dynamic loss scaling: keeps float16 gradients above underflow and below overflow.

Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from model_center.engine.current import current_engine

logger = logging.getLogger(__name__)


@dataclass
class LossScaler:
    """What the loss is multiplied by before backward, and when that changes.

    Args:
        scale: The current scale.
        enabled: Whether gradients are checked and the scale changes; otherwise it stays as it is.
        factor: What the scale is multiplied or divided by.
        steps: Number of good steps in a row after which it grows.
        minimum: It does not fall below this.
        maximum: It does not grow above this.
        steps_since_change: Number of good steps since it last changed.

    Raises:
        ValueError: If a value is out of range.
    """

    scale: float
    enabled: bool = True
    factor: float = 2
    steps: int = 1024
    minimum: float = 1
    maximum: float = math.inf
    steps_since_change: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"`loss_scale` must be a finite number above 0, but is {self.scale}")
        if not self.factor > 1:
            raise ValueError(f"`loss_scale_factor` must be above 1, but is {self.factor}")
        if self.steps < 1:
            raise ValueError(f"`loss_scale_steps` must be at least 1, but is {self.steps}")
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(
                f"`min_loss_scale` must be above 0 and at most `max_loss_scale` ({self.maximum}), but is {self.minimum}"
            )

    def overflows(self, param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a gradient of any process holds an infinity or NaN. Makes the host wait for the device."""
        if not self.enabled:
            return False
        engine = current_engine()
        # The largest absolute value tells it without a second copy of the gradients.
        return not bool(engine.total_norm(gradients_of(param_groups), math.inf).isfinite())

    def succeeded(self) -> None:
        """Counts a good step; grows the scale when there were enough."""
        if not self.enabled:
            return
        self.steps_since_change += 1
        if self.steps_since_change >= self.steps and self.scale < self.maximum:
            self._change(min(self.scale * self.factor, self.maximum))

    def failed(self) -> None:
        """Shrinks the scale after an overflow and says so on rank 0."""
        old = self.scale
        self._change(max(old / self.factor, self.minimum))
        if current_engine().rank == 0:
            logger.warning("gradient overflow: step skipped, loss scale %g -> %g", old, self.scale)

    def state_dict(self) -> dict[str, Any]:
        """All fields by name, but for infinite ones, which are defaults and which JSON has no name for."""
        return {name: value for name, value in asdict(self).items() if value != math.inf}

    def resumed(self, scale: float, steps_since_change: int, *, enabled: bool) -> "LossScaler":
        """This one with what was saved; unchanged if only that did not scale, as when float16 goes on from float32.

        Raises:
            ValueError: If `scale` is not above 0.
        """
        if self.enabled and not enabled:
            return self
        return replace(self, scale=scale, steps_since_change=steps_since_change, enabled=enabled)

    def _change(self, scale: float) -> None:
        self.scale = scale
        self.steps_since_change = 0


def gradients_of(param_groups: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """All gradients that are there."""
    gradients = (parameter.grad for group in param_groups for parameter in group["params"])
    return [gradient for gradient in gradients if gradient is not None]
