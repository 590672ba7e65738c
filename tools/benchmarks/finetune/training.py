"""The same fine-tuning twice: by the recipe, and by a plain loop over Transformers' encoder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertModel
from transformers.utils import logging

from model_center.recipe import EncoderClassifier, FinetuneConfig, Job, StepMetrics, prepare, train
from model_center.recipe.evaluation import majority_scores
from model_center.recipe.metrics import Metrics
from model_center.recipe.optimization import warmup_of

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        losses: Of each step.
        accuracy: Share of right answers on the dev split, after the last step.
        majority: The same for always answering the most frequent class.
    """

    losses: list[float]
    accuracy: float
    majority: float


class _Losses:
    def __init__(self) -> None:
        self.of_steps: list[float] = []

    def record(self, metrics: Metrics) -> None:
        if isinstance(metrics, StepMetrics):
            self.of_steps.append(metrics.loss)

    def close(self) -> None:
        pass


def train_ours(config: FinetuneConfig) -> Outcome:
    """What `model-center finetune` does."""
    job, losses = prepare(config, overwrite=True), _Losses()
    train(job, recorders=[losses])
    return _outcome(job, job.model, losses.of_steps)


class TheirClassifier(torch.nn.Module):
    """Transformers' encoder, mean over the real tokens, dropout and a linear classifier with given weights."""

    def __init__(self, name: str, dropout: float, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        logging.disable_progress_bar()
        self.encoder = BertModel.from_pretrained(name, dtype=torch.float32)
        self.dropout = torch.nn.Dropout(dropout)
        self.weight, self.bias = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(bias.clone())

    def forward(self, batch: Batch) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = (self.encoder(**inputs).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.linear(self.dropout(pooled), self.weight, self.bias)


def train_theirs(config: FinetuneConfig) -> Outcome:
    """The same batches, classifier weights, optimizer, schedule and clipping, without our model and engine."""
    job, options = prepare(config, overwrite=True), config.optimizer
    assert isinstance(job.model, EncoderClassifier)
    head = job.model.classifier.state_dict()
    model = TheirClassifier(config.model.name, job.model.head.dropout, head["weight"], head["bias"])
    model.to(job.train_loader.device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _linear(job))
    losses: list[float] = []
    while len(losses) < job.total_steps:
        for batch in job.train_loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch), batch["labels"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_gradient_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == job.total_steps:
                break
    return _outcome(job, model, losses)


def _linear(job: Job) -> Callable[[int], float]:
    """Warm-up and linear decay, of which no step has a rate of zero; Transformers' begins with one."""
    total = job.total_steps
    warmup = warmup_of(job.config.optimizer, total)
    return lambda done: min((done + 1) / max(1, warmup), (total - done) / (total + 1 - warmup))


@torch.no_grad()
def _outcome(job: Job, model: torch.nn.Module, losses: list[float]) -> Outcome:
    model.eval()
    right = torch.cat([model(batch).argmax(dim=-1) == batch["labels"] for batch in job.dev_loader])
    return Outcome(losses, right.float().mean().item(), majority_scores(job.dev_loader.dataset)["accuracy"])


def without_dropout(config: FinetuneConfig, folder: Path) -> FinetuneConfig:
    """The same training without random zeros; a copy of the encoder, which says so, is put into a new folder."""
    shutil.copytree(config.model.name, folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    return replace(config, model=replace(config.model, name=str(folder), dropout=0.0))
