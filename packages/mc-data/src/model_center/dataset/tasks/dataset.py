"""What the task data sets of all families have in common."""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from .._extra import torch
from .cache import Stored, cached
from .catalogue import find_task
from .columns import Encoded, Layout, Padding, Ragged, columns_of, stack
from .encoding import describe, encode_texts
from .reading import Example, Source, Splits, find_source, read_examples
from .task import Task

Item = dict[str, torch.Tensor]


@dataclass(eq=False, repr=False)
class TaskDataset(torch.utils.data.Dataset[Item]):
    """One split of a task, tokenized when constructed and kept as arrays.

    ``dataset[i]`` is a dict of CPU tensors, without padding unless `padding` is ``"max_length"``; `collate` makes a
    padded batch of such items. A split without labels (``test``) gives items without the label's entry.

    Rows and ranks: with `world_size` above 1, ``len(dataset)`` and ``dataset[i]`` are this rank's share, every
    `world_size`-th row. `DistributedDataLoader` uses the data set's `complete` view instead and shares it out itself,
    so the documented script, which gives rank and world size to the data set and wraps it in that loader, sees each
    row exactly once; so does a script that constructs it with rank 0 and world size 1, and one that feeds a rank's
    share to a plain `torch.utils.data.DataLoader`.

    Args:
        path: The folder that holds the task's folder (``<path>/BoolQ/train.jsonl``), or rows by split name, such as a
            `DatasetDict` of the Hugging Face `datasets` library.
        split: ``"train"``, ``"dev"`` (``val.jsonl``) or ``"test"``.
        rank: Number of this process.
        world_size: Number of processes.
        tokenizer: The family's tokenizer.
        task: What is read, and which texts are made of it.
        padding: ``"batch"`` pads a batch to its longest row, ``"max_length"`` every item to the maximum lengths.
        cache: Keep the tokenized rows in a file, and use that file when the same rows, task, lengths and tokenizer
            come again: True for the user's cache folder (or ``$MODEL_CENTER_CACHE``), or a folder.

    Raises:
        ValueError: The split is missing or empty, a row is broken (the message says file and line), or the tokenizer
            does not fit.
    """

    path: str | Path | Splits
    split: str
    rank: int
    world_size: int
    tokenizer: Any
    task: Task = field(kw_only=True)
    padding: Padding = field(default="batch", kw_only=True)
    cache: bool | str | Path = field(default=False, kw_only=True)

    family: ClassVar[str]
    limits: ClassVar[tuple[str, ...]]
    """Names of the arguments that limit lengths."""
    label_entry: ClassVar[str] = "labels"
    """Name of the entry of an item that holds its class."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"`rank` must be in [0, world_size = {self.world_size}), but is {self.rank}")
        if self.padding not in ("batch", "max_length"):
            raise ValueError(f"`padding` must be 'batch' or 'max_length', but is {self.padding!r}")
        for name in self.limits:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, but is {getattr(self, name)}")
        source = find_source(self.path, self.task, self.split)
        self._stored = self._build(source) if self.cache is False else self._cached(self.cache, source)
        self._rows = np.arange(self.rank, len(self._stored.groups), self.world_size)

    def _cached(self, cache: str | Path | Literal[True], source: Source) -> Stored:
        unfold = getattr(self.task.unfold, "__qualname__", None)
        limits = [getattr(self, name) for name in self.limits]
        identity = (self.family, self.task, unfold, self.split, limits, source.digest)
        return cached(cache, identity, self.tokenizer, lambda: self._build(source))

    def _build(self, source: Source) -> Stored:
        examples = self.variants(read_examples(source, self.task, self.split))
        columns = columns_of(self.encode(examples))
        answers = [list(example.answers) for example in examples]
        return Stored(columns, answers, [example.group for example in examples])

    def variants(self, examples: list[Example]) -> list[Example]:
        """The examples this family reads, made of those of the split."""
        return examples

    def require_classes(self) -> None:
        """Check that the task has classes.

        Raises:
            ValueError: Its answers are free text.
        """
        if not self.task.labels:
            raise ValueError(f"{type(self).__name__} reads tasks with labels, but {self.task.name!r} has `answers`")

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Turn examples into model input, as plain numbers."""

    @property
    @abstractmethod
    def layout(self) -> Mapping[str, Layout]:
        """How each entry of an item is padded."""

    def label_word(self, word: str) -> str:
        """The text that stands for a class where the answer belongs."""
        return word

    @property
    def verbalizer(self) -> torch.Tensor:
        """Token id of each class's word, of shape (classes): the columns of the logits to compare.

        Raises:
            ValueError: The task has no words, or they are not single tokens of this vocabulary that differ.
        """
        words = self.task.prompt_for(self.family).words
        encoded = encode_texts(self.tokenizer, [self.label_word(word) for word in words])
        for word, ids in zip(words, encoded, strict=True):
            if len(ids) != 1:
                raise ValueError(f"the word {word!r} of task {self.task.name!r} is {len(ids)} tokens, but must be one")
        if len({ids[0] for ids in encoded}) < len(words):
            raise ValueError(
                f"the words of task {self.task.name!r}, {', '.join(words)}, must differ, but some are the same token "
                f"for {describe(self.tokenizer)}"
            )
        if not words:
            raise ValueError(f"task {self.task.name!r} is answered with free text and has no verbalizer")
        return torch.tensor(encoded)[:, 0]

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Length of each item's longest sequence, of shape (rows)."""
        ragged = [column.lengths for column in self._stored.columns.values() if isinstance(column, Ragged)]
        longest: np.ndarray[Any, Any] = np.max(ragged, axis=0)[self._rows]
        return longest

    @property
    def labels(self) -> list[int] | None:
        """The class of each item; None if the split has no labels or the answers are free text."""
        if self.task.answers or self.label_entry not in self._stored.columns:
            return None
        column = self._stored.columns[self.label_entry]
        return [int(column[int(row)]) for row in self._rows]

    @property
    def answers(self) -> list[list[str]]:
        """The accepted answers of each item, for tasks answered with free text."""
        return [self._stored.answers[row] for row in self._rows]

    @property
    def groups(self) -> list[str]:
        """What each item is scored together with (MultiRC: its question)."""
        return [self._stored.groups[row] for row in self._rows]

    def complete(self) -> TaskDataset:
        """The same data set with the rows of all ranks; both share their memory."""
        whole = copy.copy(self)
        whole.rank, whole.world_size = 0, 1
        whole._rows = np.arange(len(self._stored.groups))
        return whole

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        row = self._rows[index]
        layout = self.layout
        item = {
            name: torch.from_numpy(np.array(column[row], dtype=layout[name].kind))
            for name, column in self._stored.columns.items()
        }
        if self.padding == "batch":
            return item
        return {name: value[0] for name, value in self._stack([item]).items()}

    def collate(self, items: Sequence[Item]) -> Item:
        """Make a batch of items: tensors of shape (batch, length) or (batch), padded on the right."""
        return self._stack(items)

    def _stack(self, items: Sequence[Item]) -> Item:
        lengths = {name: getattr(self, name) for name in self.limits} if self.padding == "max_length" else None
        return stack(items, self.layout, lengths)


AnyTaskDataset = TypeVar("AnyTaskDataset", bound=TaskDataset)


class Registry(Mapping[str, Callable[..., AnyTaskDataset]], Generic[AnyTaskDataset]):
    """The data sets of a family by task name: ``DATASET['BoolQ'](path, split, rank, world_size, tokenizer, …)``."""

    def __init__(self, dataset: type[AnyTaskDataset], tasks: Iterable[Task]) -> None:
        self._dataset = dataset
        self._tasks = {task.name: task for task in tasks}

    def __getitem__(self, name: str) -> Callable[..., AnyTaskDataset]:
        return functools.partial(self._dataset, task=find_task(name, self._tasks))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)
