"""The loader: batches of a data set, shared out among processes and moved to this process's device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ._extra import torch
from .sampling import BatchPlan

__all__ = ["DistributedDataLoader"]


class DistributedDataLoader:
    """Batches of a map-style data set for one of several processes.

    Each epoch gives every row to exactly one process. Shuffling differs by epoch, without a call to `set_epoch`, and
    is the same on every machine for the same `seed`. The last step takes what is left over, shared evenly; rows fewer
    than there are processes join the step before it, so that every process makes the same number of steps.

    Sharing out is this loader's work alone: a data set that was constructed with rank and world size is taken whole
    (see `TaskDataset`). For a data set that has already been shared out in some other way, give ``rank=0,
    world_size=1``.

    `state_dict` and `load_state_dict` continue an epoch where it stood, with the rows that are left of it, also with
    another number of processes or another batch size.

    Args:
        dataset: Has ``len(dataset)`` and ``dataset[i]``; its ``collate(items)``, if any, makes batches.
        batch_size: Rows of a batch, in each process.
        shuffle: Read the rows in a random order, another one in each epoch.
        seed: Chooses the random orders.
        drop_last: Leave out the incomplete last step.
        bucket_by_length: Put rows of similar length into one batch: True to take ``dataset.lengths``, or the length of
            each row.
        rank: Number of this process; by default that of `torch.distributed` or of torchrun's environment.
        world_size: Number of processes; by default as for `rank`.
        device: Where batches go; by default this process's GPU, and the CPU if there is none.
        num_workers: Number of worker processes that read ahead.
        collate_fn: Makes a batch of a list of items; by default the data set's ``collate``, or that of PyTorch.
        pin_memory: Whether batches pass through pinned memory; by default for GPUs.
        **options: Passed on to `torch.utils.data.DataLoader` (``prefetch_factor``, ``persistent_workers``, …).

    Attributes:
        batch_indices: Row numbers of the batch given last, e.g. to tell which prediction belongs to which row.

    Raises:
        ValueError: An argument does not fit, or there are fewer rows than processes.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        seed: int = 0,
        drop_last: bool = False,
        bucket_by_length: bool | Sequence[int] = False,
        rank: int | None = None,
        world_size: int | None = None,
        device: str | torch.device | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool | None = None,
        **options: Any,
    ) -> None:
        iterable = isinstance(dataset, torch.utils.data.IterableDataset)
        if iterable or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                "`dataset` must have a length and be indexable, so that its rows can be shared out, "
                f"but is a {type(dataset).__name__}"
            )
        rank, world_size = process_place(rank, world_size)
        self.dataset = _whole(dataset, rank, world_size)
        self.device = torch.device(device) if device is not None else _default_device()
        self.batch_indices: list[int] = []
        lengths = None
        if bucket_by_length is not False:
            lengths = _lengths(self.dataset) if bucket_by_length is True else np.asarray(bucket_by_length)
        self._plan = BatchPlan(len(self.dataset), batch_size, rank, world_size, shuffle, seed, drop_last, lengths)
        self._batches: list[np.ndarray[Any, Any]] = []
        self._begun = False
        self._iteration = 0
        self._generator = torch.Generator()
        self._loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=_Batches(self),
            num_workers=num_workers,
            collate_fn=collate_fn or getattr(self.dataset, "collate", None),
            pin_memory=self.device.type == "cuda" if pin_memory is None else pin_memory,
            generator=self._generator,
            **options,
        )

    @property
    def epoch(self) -> int:
        """Number of the present epoch; between two epochs, that of the next."""
        return self._plan.epoch

    def __len__(self) -> int:
        """Number of batches this process gets in a whole epoch."""
        return self._plan.steps

    def __iter__(self) -> Iterator[Any]:
        if self._begun:  # the epoch before was left early
            self._plan.start_epoch(self._plan.epoch + 1)
        self._begun = True
        self._iteration += 1
        self._batches, ends = self._plan.remaining()
        # Workers get their seeds from here; PyTorch's global generator is left as it is.
        place = np.random.SeedSequence([self._plan.seed, self._plan.epoch, self._plan.rank])
        self._generator.manual_seed(int(place.generate_state(1)[0]))
        return self._give(self._iteration, ends)

    def _give(self, iteration: int, ends: list[int]) -> Iterator[Any]:
        for batch, indices, consumed in zip(self._loader, self._batches, ends, strict=True):
            if iteration != self._iteration:
                raise RuntimeError("this epoch has ended: the loader has been iterated over again, or moved")
            self.batch_indices, self._plan.consumed = indices.tolist(), consumed
            yield _move(batch, self.device)
        self._plan.start_epoch(self._plan.epoch + 1)
        self._begun = False

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch.

        An epoch that has been resumed and not yet begun keeps its place.
        """
        if epoch != self._plan.epoch or self._begun:
            self._plan.start_epoch(epoch)
            self._begun = False
            self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: the same in all processes, small, and made of plain numbers.

        It counts the batches that have been given out, not those that workers have prepared.
        """
        return self._plan.state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where a loader stood.

        Args:
            state_dict: The `state_dict` of a loader over the same rows with the same seed and order, in any number of
                processes.

        Raises:
            ValueError: It belongs to other rows or another order.
        """
        self._plan.restore(state_dict)
        self._begun = False
        self._iteration += 1


class _Batches(torch.utils.data.Sampler[list[int]]):
    """The batches that PyTorch's loader fetches: those of the iteration that has just begun."""

    def __init__(self, loader: DistributedDataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self._loader._batches)

    def __len__(self) -> int:
        return len(self._loader._batches)


def process_place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Number of this process and number of processes: as given, or as `torch.distributed` or torchrun say."""
    if (rank is None) != (world_size is None):
        raise ValueError("`rank` and `world_size` belong together: give both or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def _whole(dataset: Any, rank: int, world_size: int) -> Any:
    """The data set with the rows of all ranks, if this loader is to share them out.

    Raises:
        ValueError: It holds the rows of one rank only, and no others can be had from it.
    """
    if world_size == 1:
        return dataset
    if _is_share(dataset) and hasattr(dataset, "complete"):
        if (dataset.rank, dataset.world_size) == (rank, world_size):
            return dataset.complete()
        raise ValueError(
            f"the data set holds the rows of rank {dataset.rank} of {dataset.world_size}, but the loader is rank "
            f"{rank} of {world_size}: give both the same, or the loader rank=0, world_size=1 to read just these rows"
        )
    inside = list(vars(dataset).values()) if hasattr(dataset, "__dict__") else []
    several = [entry for value in inside if isinstance(value, list | tuple) for entry in value]
    if any(map(_is_share, (dataset, *inside, *several))):
        raise ValueError(
            "the data set already holds only one rank's rows, and the loader would share them out again: construct it "
            "with rank 0 and world size 1, or give the loader rank=0, world_size=1"
        )
    return dataset


def _is_share(value: Any) -> bool:
    """Whether it is a data set of which other ranks have other rows."""
    return hasattr(value, "__getitem__") and hasattr(value, "rank") and getattr(value, "world_size", 1) > 1


def _lengths(dataset: Any) -> np.ndarray[Any, Any]:
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        raise ValueError("`bucket_by_length=True` needs `dataset.lengths`; give the length of each row instead")
    return np.asarray(lengths)


def _move(batch: Any, device: torch.device) -> Any:
    """The same structure with its tensors on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: _move(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_move(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_move(value, device) for value in batch)
    return batch
