"""The places of the pre-training loop that people change."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from model_center.engine.lr_scheduler import WarmupLRScheduler
from model_center.engine.optim import AdamOptimizer
from model_center.model.base import BaseModel
from model_center.model.config import Config

from .configuration import OptimizerOptions
from .metrics import StepMetrics, ValidationMetrics
from .optimization import make_optimizer, make_scheduler
from .pretrain_configuration import ObjectiveOptions
from .pretraining_objectives import PretrainingObjective, make_objective

if TYPE_CHECKING:
    from .pretraining_job import PretrainingJob


class MicroBatch(Protocol):
    """What one process computes at once."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""

    @property
    def labels(self) -> Tensor:
        """Ids to predict, (rows, length), on the CPU; -100 where there is nothing to predict."""

    def to(self, device: torch.device) -> Self:
        """Return it with its inputs on a device. Labels stay on the CPU, where `summed_loss` of a model takes them."""


SummedLoss: TypeAlias = Callable[[BaseModel, MicroBatch], Tensor]


def cross_entropy(model: BaseModel, batch: MicroBatch) -> Tensor:
    """Return the cross-entropy of a micro-batch, summed over its target tokens."""
    output = model(**batch.inputs, return_logits=False)
    return model.summed_loss(output.last_hidden_state, batch.labels)


class Callbacks:
    """What `pretrain` asks for and tells as it goes on: override the methods that are to do something else.

    All are called in every process, so what they do must be the same in all, or need no communication.
    """

    def make_objective(self, config: Config, tokenizer: Any, options: ObjectiveOptions) -> PretrainingObjective:
        """Return what becomes of a sequence of ids; its fingerprint must tell it from others."""
        return make_objective(config, tokenizer, options)

    def make_optimizer(self, model: BaseModel, options: OptimizerOptions) -> AdamOptimizer:
        """Return the optimizer, of which checkpoints can hold Adam's kind only."""
        return make_optimizer(model, options)

    def make_scheduler(
        self, optimizer: AdamOptimizer, options: OptimizerOptions, total_steps: int
    ) -> WarmupLRScheduler:
        """Return the learning rate's schedule for a run of so many steps, from the first one on."""
        return make_scheduler(optimizer, options, total_steps)

    def summed_loss(self, model: BaseModel, batch: MicroBatch) -> Tensor:
        """Return the loss of a micro-batch on the engine's device, a scalar summed over its target tokens.

        The loop divides by the target tokens of the whole step. Validation uses it too. The batch's inputs are on the
        engine's device, its labels on the CPU.
        """
        return cross_entropy(model, batch)

    def after_step(self, job: "PretrainingJob", metrics: StepMetrics) -> None:
        """A step is done: the model has been updated, its gradients are those of the step, clipped."""

    def after_validation(self, job: "PretrainingJob", metrics: ValidationMetrics) -> None:
        """The loss on the validation data has been measured; the model is in evaluation mode."""

    def after_checkpoint(self, job: "PretrainingJob", path: Path) -> None:
        """A checkpoint is complete; if it is written while training goes on, that is told later, at last at the end."""
