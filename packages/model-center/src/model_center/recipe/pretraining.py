"""Pre-training: the gradient of one step, the same however its samples are divided."""

from collections.abc import Iterable
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from model_center import engine
from model_center.model.base import BaseModel


class MicroBatch(Protocol):
    """What one process computes at once."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""

    @property
    def labels(self) -> Tensor:
        """Ids to predict, (rows, length); -100 where there is nothing to predict."""

    def to(self, device: torch.device) -> Self:
        """Return it on a device."""


def accumulate_gradients(
    model: BaseModel, manager: engine.optim.OptimManager, batches: Iterable[MicroBatch], targets: int
) -> Tensor:
    """Add up the gradients of the mean loss over all target tokens of the global batch.

    The result does not depend on the number of processes, nor on how the samples are divided into micro-batches,
    packed or padded. All processes must call it, with the same number of micro-batches.

    Args:
        model: the model.
        manager: scales the loss for the engine and, where there is one, by the loss scale.
        batches: micro-batches of this process.
        targets: labels of the global batch that are not -100, over all processes.

    Returns:
        The mean loss of the global batch, a scalar on the engine's device; the host does not wait for it.
    """
    current = engine.current_engine()
    total = torch.zeros((), device=current.device)
    for batch in batches:
        batch = batch.to(current.device)
        output = model(**batch.inputs, return_logits=False)
        summed = model.summed_loss(output.last_hidden_state, batch.labels)
        # The manager lets processes average: of a mean over all targets, each has world_size times its share.
        manager.backward(summed * (current.world_size / targets))
        total += summed.detach()
    return engine.distributed.all_reduce(total, "sum") / targets
