"""The recipe's training against a plain loop of PyTorch and Transformers over the same batches."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_encoder import write_encoder, write_task

from model_center.recipe import (
    DataOptions,
    EncoderClassifier,
    FinetuneConfig,
    ModelOptions,
    OptimizerOptions,
    StepMetrics,
    prepare,
    train,
)
from model_center.recipe.metrics import Metrics


class Losses:
    """A recorder that keeps the loss and the gradient norm of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def record(self, metrics: Metrics) -> None:
        if isinstance(metrics, StepMetrics):
            self.steps.append((metrics.loss, metrics.gradient_norm))

    def close(self) -> None:
        pass


def test_losses_and_gradient_norms_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "model", dropout_p=0.0, att_dropout_p=0.0)
    config = FinetuneConfig(
        output=str(tmp_path / "run"),
        epochs=2,
        seed=3,
        model=ModelOptions(name=str(model), dropout=0.0),
        data=DataOptions(path=str(write_task(tmp_path / "data")), max_length=32, batch_size=8),
        optimizer=OptimizerOptions(
            learning_rate=3e-3, warmup_ratio=0.25, weight_decay=0.1, beta1=0.8, beta2=0.95, max_gradient_norm=0.5
        ),
    )
    job = prepare(config)
    assert isinstance(job.model, EncoderClassifier)
    job.model.encoder.export_huggingface(tmp_path / "huggingface")
    encoder = transformers.BertModel.from_pretrained(tmp_path / "huggingface").train()
    classifier = torch.nn.Linear(16, 2)
    classifier.load_state_dict(job.model.classifier.state_dict())
    recorder = Losses()
    train(job, recorders=[recorder])

    parameters = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1, betas=(0.8, 0.95))
    loader = prepare(config, overwrite=True).train_loader
    found, step = [], 0
    for _ in range(2):
        for batch in loader:
            step += 1
            optimizer.param_groups[0]["lr"] = 3e-3 * min(step / 6, (25 - step) / 19)
            labels = batch.pop("labels")
            hidden = encoder(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            loss = torch.nn.functional.cross_entropy(classifier((hidden * mask).sum(1) / mask.sum(1)), labels)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            found.append((loss.item(), norm.item()))
    assert step == 24
    assert [loss for loss, _ in recorder.steps] == pytest.approx([loss for loss, _ in found], rel=1e-4)
    assert [norm for _, norm in recorder.steps] == pytest.approx([norm for _, norm in found], rel=1e-3)
    assert sum(loss for loss, _ in found[-6:]) < sum(loss for loss, _ in found[:6])
