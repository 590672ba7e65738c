"""Scores of predictions: the official measures of each task, over the predictions of all processes.

evaluator = Evaluator(loader.dataset)
for batch in loader:
    evaluator.add(loader.batch_indices, predict(batch))
scores = evaluator.compute()
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from ._extra import torch
from .loader import process_place
from .tasks.dataset import TaskDataset
from .tasks.task import Task

__all__ = [
    "Evaluator",
    "accuracy",
    "binary_f1",
    "exact_match",
    "group_exact_match",
    "macro_f1",
    "official_scores",
    "token_f1",
]

Prediction = int | str
Gather = Callable[[torch.Tensor], torch.Tensor]
"""Brings together a tensor of shape (n), where n differs between processes: shape (sum of all n)."""


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Share of classes that are right."""
    # Imported where it is used: scikit-learn takes longer to import than most evaluations take.
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def macro_f1(predictions: Sequence[int], labels: Sequence[int], classes: int) -> float:
    """Mean over all classes of each class's F1; 0 for a class that is neither predicted nor right anywhere."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, labels=range(classes), average="macro", zero_division=0))


def binary_f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """F1 of class 1 (MultiRC's F1a)."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def group_exact_match(predictions: Sequence[int], labels: Sequence[int], groups: Sequence[str]) -> float:
    """Share of groups whose classes are all right (MultiRC's EM: a question with all its answers)."""
    right: dict[str, bool] = defaultdict(lambda: True)
    for prediction, label, group in zip(predictions, labels, groups, strict=True):
        right[group] &= prediction == label
    return sum(right.values()) / len(right)


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Share of texts that equal one of the accepted answers, normalised as SQuAD does."""
    return _mean_best(predictions, answers, lambda prediction, answer: float(prediction == answer))


def token_f1(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Mean F1 of a text's words against the accepted answer that fits best, normalised as SQuAD does."""
    return _mean_best(predictions, answers, _overlap)


def official_scores(
    task: Task,
    predictions: Sequence[Prediction],
    *,
    labels: Sequence[int] = (),
    answers: Sequence[Sequence[str]] = (),
    groups: Sequence[str] = (),
) -> dict[str, float]:
    """The measures that a task is published with.

    Args:
        task: The task.
        predictions: The predicted classes, or texts.
        labels: The right classes.
        answers: The accepted texts of each row, for tasks answered with free text.
        groups: What each row is scored together with.

    Raises:
        ValueError: There is nothing to score.
    """
    if not predictions:
        raise ValueError("there are no predictions to score")
    measures: dict[str, Callable[[], float]] = {
        "accuracy": lambda: accuracy(_classes(predictions), labels),
        "macro_f1": lambda: macro_f1(_classes(predictions), labels, len(task.labels)),
        "binary_f1": lambda: binary_f1(_classes(predictions), labels),
        "group_exact_match": lambda: group_exact_match(_classes(predictions), labels, groups),
        "exact_match": lambda: exact_match(_texts(predictions), answers),
        "token_f1": lambda: token_f1(_texts(predictions), answers),
    }
    return {name: measures[name]() for name in task.metrics}


class Evaluator:
    """Collects predictions by row number, so that no row counts twice, and scores those of all processes.

    Args:
        dataset: The data set that the loader reads, with all rows (``loader.dataset``).

    Raises:
        ValueError: Its rows have neither labels nor answers.
    """

    def __init__(self, dataset: TaskDataset) -> None:
        self._task = dataset.task
        self._labels, self._answers, self._groups = dataset.labels, dataset.answers, dataset.groups
        if self._labels is None and not any(self._answers):
            raise ValueError(f"split {dataset.split!r} of {dataset.task.name} has no labels to compare with")
        self._predictions: dict[int, Prediction] = {}

    def add(self, rows: Sequence[int], predictions: torch.Tensor | Sequence[Prediction]) -> None:
        """Note the predictions of a batch.

        Args:
            rows: The numbers of its rows (``loader.batch_indices``).
            predictions: The predicted class (integers of shape (batch)) or text of each.

        Raises:
            ValueError: There are not as many of the one as of the other.
        """
        values = predictions.tolist() if isinstance(predictions, torch.Tensor) else predictions
        if len(rows) != len(values):
            raise ValueError(f"there are {len(values)} predictions for {len(rows)} rows")
        self._predictions.update(zip(rows, values, strict=True))

    def compute(self, gather: Gather | None = None) -> dict[str, float]:
        """The task's official measures over the rows of all processes; the same in each of them.

        Args:
            gather: Brings together what all processes have, such as `engine.gather_result`; by default
                `torch.distributed` does, if there are several.

        Raises:
            ValueError: There are several processes and no way to bring their predictions together.
        """
        # One line of JSON from each process, as numbers: what every kind of gathering can carry.
        mine = json.dumps(list(self._predictions.items())) + "\n"
        gathered = (gather or _gather)(torch.tensor(list(mine.encode()), dtype=torch.int32))
        lines = bytes(gathered.tolist()).decode().splitlines()
        everything: dict[int, Prediction] = {row: value for line in lines for row, value in json.loads(line)}
        rows = sorted(everything)
        return official_scores(
            self._task,
            [everything[row] for row in rows],
            labels=[self._labels[row] for row in rows] if self._labels is not None else (),
            answers=[self._answers[row] for row in rows],
            groups=[self._groups[row] for row in rows],
        )


def _gather(mine: torch.Tensor) -> torch.Tensor:
    _, world_size = process_place(None, None)
    if world_size == 1:
        return mine
    if not torch.distributed.is_initialized():
        raise ValueError(f"there are {world_size} processes, but torch.distributed is not initialised: give `gather`")
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, mine)
    return torch.cat(parts)


def _classes(predictions: Sequence[Prediction]) -> list[int]:
    return [int(prediction) for prediction in predictions]


def _texts(predictions: Sequence[Prediction]) -> list[str]:
    return [str(prediction) for prediction in predictions]


def _mean_best(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], score: Callable[[str, str], float]
) -> float:
    best = [
        max(score(_normalised(prediction), _normalised(answer)) for answer in accepted)
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]
    return sum(best) / len(best)


def _overlap(prediction: str, answer: str) -> float:
    predicted, right = prediction.split(), answer.split()
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right)) if predicted or right else 1.0


def _normalised(text: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
