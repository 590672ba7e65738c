"""Evaluation of fine-tuned models, in training and of finished checkpoints."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from model_center import engine
from model_center.dataset import DistributedDataLoader
from model_center.dataset.evaluation import Evaluator, Prediction, official_scores
from model_center.dataset.tasks import load_task
from model_center.dataset.tasks.dataset import TaskDataset

from .classifier import load_classifier
from .metrics import EvaluationMetrics
from .prompting import HEAD_FILE, PromptHead, load_prompt_model
from .task_input import read_split
from .task_model import TaskModel


def make_loader(
    dataset: TaskDataset, batch_size: int, *, shuffle: bool = False, seed: int = 0, bucket_by_length: bool = True
) -> DistributedDataLoader:
    """Return batches of this process's share of a data set: of classes on the engine's device, of texts on the CPU.

    The loss looks for the tokens of texts in the targets, for which the host would have to wait on a GPU.
    """
    device = engine.current_engine().device
    return DistributedDataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        bucket_by_length=bucket_by_length,
        rank=engine.rank(),
        world_size=engine.world_size(),
        device=torch.device("cpu") if dataset.task.answers else device,
        pin_memory=device.type == "cuda",
    )


@torch.no_grad()
def evaluate(
    model: TaskModel, loader: DistributedDataLoader, *, step: int = 0, epoch: float = 0.0
) -> EvaluationMetrics:
    """Evaluate a model on all samples of a loader.

    Args:
        model: the model; it is left in evaluation mode.
        loader: batches of a labelled split.
        step: training steps done.
        epoch: passes over the training split done.
    """
    model.eval()
    evaluator = Evaluator(loader.dataset)
    total = torch.zeros((), dtype=torch.float64, device=engine.current_engine().device)
    targets = 0
    for batch in loader:
        loss, answers = model.answer(batch)
        total += loss.summed
        targets += loss.targets
        evaluator.add(loader.batch_indices, answers)
    scores = evaluator.compute(engine.gather_result)
    measure = next(iter(scores))
    total, all_targets = engine.distributed.all_reduce(torch.stack([total, total.new_tensor(targets)]))
    return EvaluationMetrics(
        step=step,
        epoch=epoch,
        loss=(total / all_targets).item(),
        measure=measure,
        score=scores[measure],
        baseline=majority_scores(loader.dataset)[measure],
        scores=scores,
        samples=len(loader.dataset),
    )


def majority_scores(dataset: TaskDataset) -> dict[str, float]:
    """Return a task's official measures for always giving the split's commonest answer, a class or a text."""
    labels = dataset.labels or []
    given: list[Prediction] = [*labels] or [answers[0] for answers in dataset.answers]
    ((majority, _),) = Counter(given).most_common(1)
    return official_scores(
        dataset.task, [majority] * len(given), labels=labels, answers=dataset.answers, groups=dataset.groups
    )


def load_task_model(directory: Path | str, dtype: torch.dtype | None = None) -> tuple[TaskModel, Any]:
    """Load a model that was fine-tuned, of any family, e.g. a run's `checkpoints/best`.

    Args:
        directory: the checkpoint.
        dtype: type of the weights, if not the one they were trained in.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: the directory holds no such checkpoint, a damaged one, or one of a newer format.
    """
    answers_prompts = (Path(directory) / HEAD_FILE).is_file()
    return load_prompt_model(directory, dtype) if answers_prompts else load_classifier(directory, dtype)


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
    model, tokenizer = load_task_model(directory)
    head = model.head
    dataset = read_split(
        data_path,
        split,
        load_task(head.task),
        tokenizer,
        head.max_length,
        family=model.backbone.config.model_type,
        max_answer_length=head.max_answer_length if isinstance(head, PromptHead) else None,
    )
    return evaluate(model, make_loader(dataset, batch_size))
