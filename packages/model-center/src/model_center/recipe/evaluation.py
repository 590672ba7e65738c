"""Evaluation of classifiers, in training and of finished checkpoints."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from model_center import engine
from model_center.dataset import DistributedDataLoader
from model_center.dataset.bertdataset import BertDataset
from model_center.dataset.evaluation import Evaluator, official_scores
from model_center.dataset.tasks import Task, load_task

from .classifier import EncoderClassifier, load_classifier
from .metrics import EvaluationMetrics


def read_split(path: str | Path, split: str, task: Task, tokenizer: Any, max_length: int) -> BertDataset:
    """Read and tokenize one split of a task.

    Raises:
        ValueError: it is missing, or a row is broken (the message says file and line).
    """
    return BertDataset(
        path, split, engine.rank(), engine.world_size(), tokenizer, task=task, max_encoder_length=max_length
    )


def make_loader(
    dataset: BertDataset, batch_size: int, *, shuffle: bool = False, seed: int = 0, bucket_by_length: bool = True
) -> DistributedDataLoader:
    """Return batches of this process's share of a data set, on the engine's device."""
    return DistributedDataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        bucket_by_length=bucket_by_length,
        rank=engine.rank(),
        world_size=engine.world_size(),
        device=engine.current_engine().device,
    )


@torch.no_grad()
def evaluate(
    model: EncoderClassifier, loader: DistributedDataLoader, *, step: int = 0, epoch: float = 0.0
) -> EvaluationMetrics:
    """Evaluate a classifier on all samples of a loader.

    Args:
        model: the classifier; it is left in evaluation mode.
        loader: batches of a labelled split.
        step: training steps done.
        epoch: passes over the training split done.
    """
    model.eval()
    loss_function = engine.loss.FusedCrossEntropy(reduction="sum")
    evaluator = Evaluator(loader.dataset)
    total_loss = torch.zeros((), device=loader.device)
    for batch in loader:
        logits = model(batch)
        total_loss += loss_function(logits, batch["labels"])
        evaluator.add(loader.batch_indices, logits.argmax(dim=-1))
    scores = evaluator.compute(engine.gather_result)
    measure = next(iter(scores))
    return EvaluationMetrics(
        step=step,
        epoch=epoch,
        loss=engine.distributed.all_reduce(total_loss).item() / len(loader.dataset),
        measure=measure,
        score=scores[measure],
        baseline=majority_scores(loader.dataset)[measure],
        scores=scores,
        samples=len(loader.dataset),
    )


def majority_scores(dataset: BertDataset) -> dict[str, float]:
    """Return a task's official measures for always answering the split's most frequent class."""
    labels = dataset.labels or []
    ((majority, _),) = Counter(labels).most_common(1)
    return official_scores(dataset.task, [majority] * len(labels), labels=labels, groups=dataset.groups)


def evaluate_checkpoint(
    directory: str | Path, data_path: str | Path, *, split: str = "dev", batch_size: int = 64
) -> EvaluationMetrics:
    """Load a checkpoint of a run and evaluate it on the task it was trained for.

    Args:
        directory: the checkpoint, e.g. a run's `checkpoints/best`.
        data_path: folder that holds the task's folder.
        split: split to evaluate on.
        batch_size: sequences in a step.

    Raises:
        ValueError, OSError: the checkpoint or the data is missing, broken or does not fit.
    """
    model, tokenizer = load_classifier(directory)
    task = load_task(model.head.task)
    return evaluate(
        model, make_loader(read_split(data_path, split, task, tokenizer, model.head.max_length), batch_size)
    )
