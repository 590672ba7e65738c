"""The batches of pre-training: a global order of samples that depends on nothing but the corpus and the seed.

Step k trains on the samples from k·G to (k+1)·G of that order, where G is the number of samples in a step, whatever
the number of processes, the size of micro-batches, and whether rows are packed.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from model_center import engine
from model_center.dataset.indexed import IndexedDatasetError, Permutation, pack_rows
from model_center.dataset.indexed.objectives import Sample
from model_center.tokenizer import Tokenizer

from .pretraining_batches import Batch, Collator, StepBatches
from .pretraining_corpus import Corpus, IntArray, RowCorpus, SampleError
from .pretraining_objectives import PretrainingObjective

__all__ = ["Batch", "PretrainingData", "StepBatches"]


def sum_over_processes(number: int) -> int:
    """Return the sum of a number over all processes; all must call it."""
    if engine.world_size() == 1:
        return number
    return int(engine.distributed.all_reduce(torch.tensor(number), "sum"))


class PretrainingData:
    """The training and validation batches of one process.

    An epoch is a random order of all training samples, another one each time; epochs follow one another without a gap.
    What is drawn for a sample (masks, spans) depends on the seed, the epoch and the sample's number alone. A thread
    prepares the steps that follow the one asked for. Close it when training ends, or use it in a `with` statement.

    Args:
        folder: Folder of the indexed data sets.
        name: Common start of the names of the training files, `<name>_1`, `<name>_2`, …
        objective: What the model is to learn (`make_objective`).
        global_size: Samples in a step, over all processes.
        micro_size: Rows in a micro-batch.
        tokenizer: The model's; must be the one that made the files, where their manifests tell. None checks nothing.
        seed: Decides the order of the samples and what is drawn for them.
        pack: Put several samples into one row, which see nothing of each other; otherwise rows are padded.
        full_rows: Read the files as one stream of tokens, cut into rows of the objective's length (causal only): a
            sample then is a row, and no token is lost to cutting or padding.
        fixed_shape: Pad every row to the objective's lengths, so that all batches but the last have one shape;
            otherwise to the longest of its micro-batch.
        validation_name: Common start of the names of the validation files.
        validation_share: Without these files, the share of the samples, the last ones, that is held out instead.
        rank: Number of this process.
        world_size: Number of processes.
        prefetch: How many steps are prepared ahead; 0 works without a thread.
        pin_memory: Put batches into page-locked memory; None does so where there is CUDA.
        add_up: Adds up a number over all processes.

    Attributes:
        fingerprint: Whoever has the same one gets the same samples in the same order.
        total: Number of training samples in an epoch.

    Raises:
        ValueError: There are no such files, they are empty or of another tokenizer, or an option does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        objective: PretrainingObjective,
        *,
        global_size: int,
        micro_size: int,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        pack: bool = True,
        full_rows: bool = False,
        fixed_shape: bool = False,
        validation_name: str | None = None,
        validation_share: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        add_up: Callable[[int], int] = sum_over_processes,
    ) -> None:
        for option, value in (("global_size", global_size), ("micro_size", micro_size)):
            if value < 1:
                raise ValueError(f"`{option}` must be at least 1, but is {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must lie between 0 and `world_size` - 1 ({world_size - 1}), but is {rank}")
        if not 0 <= validation_share < 1:
            raise ValueError(f"`validation_share` must be at least 0 and below 1, but is {validation_share}")
        kind = RowCorpus if full_rows else Corpus
        self._corpus = kind(Path(folder), name, objective, seed=seed, tokenizer=tokenizer)
        count = len(self._corpus)
        self.total = count
        self._validation, self._held_out = self._corpus, np.arange(0)
        if validation_name is not None:
            self._validation = kind(Path(folder), validation_name, objective, seed=seed, tokenizer=tokenizer)
            self._held_out = np.arange(len(self._validation))
        elif validation_share:
            self.total = count - max(1, round(count * validation_share))
            self._held_out = np.arange(self.total, count)
        if not self.total:
            raise ValueError(
                f"{self._corpus.place}: its {count} samples leave none to train on when a share of {validation_share} "
                "is held out; lower `validation_share` or give files for validation"
            )
        self._objective, self._seed = objective, seed
        self._global_size, self._micro_size, self._rank, self._world_size = global_size, micro_size, rank, world_size
        self._pack = pack and not full_rows
        self._collate = Collator(
            objective.model_type, pack or full_rows, objective.takes_positions, objective.sides if fixed_shape else None
        )
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._add_up = add_up
        identity = f"{self._corpus.fingerprint} {self.total}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._order = lru_cache(maxsize=2)(lambda epoch: Permutation(self.total, seed, epoch))
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(1, "pretraining-data") if prefetch else None
        self._prepared: dict[int, Future[tuple[list[Batch], list[int]]]] = {}

    def step(self, number: int) -> StepBatches:
        """Return this process's batches of a step; all processes must ask for the same steps.

        Args:
            number: Of the step, counted from 0. Any step is found at once.

        Raises:
            SampleError, IndexedDatasetError: A sample cannot be used; the message names it.
        """
        if number < 0:
            raise ValueError(f"`number` must not be negative, but is {number}")
        batches, samples = self._prepare(number)
        return StepBatches(batches, self._add_up(sum(batch.targets for batch in batches)), samples)

    def validation(self) -> Iterator[Batch]:
        """Yield this process's validation batches, as many in every process; the same ones each time."""
        for start in range(0, len(self._held_out), self._global_size):
            numbers = self._held_out[start : start + self._global_size]
            yield from self._build(self._validation, numbers, np.zeros_like(numbers))[0]

    def samples_of(self, number: int) -> tuple[IntArray, IntArray]:
        """Return the numbers and the epochs of a step's samples, over all processes, in their global order."""
        positions = np.arange(number * self._global_size, (number + 1) * self._global_size)
        epochs, places = np.divmod(positions, self.total)
        parts = [self._order(int(epoch)).gather(places[epochs == epoch]) for epoch in np.unique(epochs)]
        return np.concatenate(parts), epochs

    def close(self) -> None:
        """Stop preparing; what is in work is finished first."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._prepared.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, number: int) -> tuple[list[Batch], list[int]]:
        """Take a step that has been prepared, or prepare it now, and set the thread to the steps that follow."""
        if self._thread is None:
            return self._step(number)
        wanted = range(number, number + 1 + self._prefetch)
        for other in [step for step in self._prepared if step not in wanted]:
            self._prepared.pop(other).cancel()
        for step in wanted:
            if step not in self._prepared:
                self._prepared[step] = self._thread.submit(self._step, step)
        return self._prepared.pop(number).result()

    def _step(self, number: int) -> tuple[list[Batch], list[int]]:
        try:
            return self._build(self._corpus, *self.samples_of(number))
        except (IndexedDatasetError, SampleError) as error:
            raise type(error)(f"step {number}: {error}") from error

    def _build(self, corpus: Corpus, numbers: IntArray, epochs: IntArray) -> tuple[list[Batch], list[int]]:
        """Make this process's batches of some samples, of which all processes know how they share them out."""
        sizes = corpus.sizes(numbers)
        if self._pack:
            rows = pack_rows(sizes, self._objective.sides)
        else:
            rows = [[sample] for sample in np.argsort(-sizes.max(axis=1, initial=0), kind="stable").tolist()]
        # Rows are sorted by length, so what the processes compute at the same time takes them about as long.
        mine = rows[self._rank :: self._world_size]
        count = -(-len(rows) // (self._world_size * self._micro_size))
        ordered = np.array([sample for row in mine for sample in row], dtype=np.int64)
        made: dict[int, Sample] = {}
        for epoch in np.unique(epochs[ordered]).tolist():
            places = ordered[epochs[ordered] == epoch]
            made |= dict(zip(places.tolist(), corpus.samples(numbers[places], epoch), strict=True))
        batches = []
        for number in range(count):
            part = mine[number * self._micro_size : (number + 1) * self._micro_size]
            batch = self._collate([[made[sample] for sample in row] for row in part])
            batches.append(batch.pin_memory() if self._pin else batch)
        return batches, numbers[ordered].tolist()
