"""What fine-tuning needs of a model: the loss and the answers of a task's batches, and a checkpoint of its own."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from model_center import engine
from model_center.dataset.evaluation import Prediction
from model_center.model import BaseModel, EncoderLM, families
from model_center.model.families import find_family

from .configuration import require
from .stored_models import absent_heads_unsaid

FORMAT_VERSION = 1
Batch = Mapping[str, Tensor]
"""A batch of a task's data set: tensors of shape (rows) or (rows, length)."""


def to_engine(batch: Batch) -> Batch:
    """Return a batch on the engine's device, to which page-locked memory is copied in the background."""
    device = engine.current_engine().device
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Loss:
    """Cross entropy of one process's rows of a batch.

    Attributes:
        summed: Its sum over the targets, a float32 scalar.
        targets: Number of targets: the rows, or the tokens of their answers.
    """

    summed: Tensor
    targets: int


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """What a fine-tuned model was made for; kept in its checkpoint."""

    task: str
    """Name of the task, or the file of its definition."""
    max_length: int
    """Longest encoded sequence in training, in tokens."""


HeadT = TypeVar("HeadT", bound=TaskHead)


class TaskModel(torch.nn.Module, ABC):
    """A pre-trained model with what turns a task's batches into a loss and answers.

    Args:
        head: what it is made for.
    """

    head_file: ClassVar[str]
    """Name of the file of a checkpoint that holds `head`."""

    def __init__(self, head: TaskHead) -> None:
        super().__init__()
        self.head = head

    @property
    @abstractmethod
    def backbone(self) -> BaseModel:
        """The pre-trained model."""

    @property
    @abstractmethod
    def answers_in(self) -> str:
        """What it answers with, in words, e.g. `2 classes`."""

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """Return the loss of a batch, to be trained on. All processes must call it."""

    @abstractmethod
    def answer(self, batch: Batch) -> tuple[Loss, Tensor | Sequence[Prediction]]:
        """Return loss and answers of a batch, one class or text a row. All processes must call it."""

    def save(self, tokenizer: Any, directory: Path) -> None:
        """Write model, head and tokenizer into an empty directory; `from_pretrained` reads it as well.

        With several processes all must call it; the first one writes.
        """
        self.backbone.save_pretrained(directory)
        if engine.rank() == 0:
            tokenizer.save_pretrained(directory)
            head = {"format_version": FORMAT_VERSION} | asdict(self.head)
            (directory / self.head_file).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")


class ClassModel(TaskModel):
    """A task model that scores classes: its `forward` turns a batch into logits (rows, classes)."""

    label_entry = "labels"
    """Entry of a batch that holds the classes."""

    def loss(self, batch: Batch) -> Loss:
        """Return the cross entropy of the classes."""
        return self._loss(self(batch), batch)

    def answer(self, batch: Batch) -> tuple[Loss, Tensor]:
        """Return the loss, and the class with the highest score of each row."""
        logits = self(batch)
        return self._loss(logits, batch), logits.argmax(dim=-1)

    def _loss(self, logits: Tensor, batch: Batch) -> Loss:
        labels = batch[self.label_entry]
        return Loss(engine.loss.FusedCrossEntropy(reduction="sum")(logits, labels), len(labels))


def load_backbone(name: str | Path, *, dtype: torch.dtype | None = None, family: str | None = None) -> BaseModel:
    """Load the model of a checkpoint; of an encoder, whatever heads it has.

    Args:
        name: directory or identifier, as for `Bert.from_pretrained`.
        dtype: type of the weights, if not that of the checkpoint's configuration.
        family: family of a checkpoint that does not name its own.

    Raises:
        ValueError, OSError: there is no such checkpoint or family, or it is damaged.
    """
    require(family is None or family in families, "model.family", f"one of {', '.join(families)}", family)
    model_class = find_family(name) if family is None else families[family]
    # A classifier takes the place of an encoder's heads.
    with absent_heads_unsaid() if issubclass(model_class, EncoderLM) else nullcontext():
        return model_class.from_pretrained(name, dtype=dtype)


def read_head(file: Path, head_class: type[HeadT], what: str) -> HeadT:
    """Read the head of a checkpoint.

    Args:
        file: its file.
        head_class: what it holds.
        what: the same in words, for messages.

    Raises:
        ValueError: the file is missing, damaged or of a newer format.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        if version > FORMAT_VERSION:
            raise ValueError(f"it has format version {version}; this version reads up to {FORMAT_VERSION}")
        return head_class(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.parent} holds no {what}: {file.name} cannot be read ({error})") from error
