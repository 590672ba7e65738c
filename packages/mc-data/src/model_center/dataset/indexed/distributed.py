"""The samples of many data sets, divided between the ranks of a training run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from .durable import complete_publication
from .format import Array, IndexedDatasetError, IntArray, StrPath
from .permutation import Permutation
from .reader import MMapIndexedDataset


class DistributedMMapIndexedDataset(Sequence[Array]):
    """What one rank reads of `<path>/<name>_1`, `<path>/<name>_2`, … (section 1.5.3).

    All sequences of all files, in the order of the file numbers, have a global order: as they are, or with a `seed`
    shuffled across all files, differently in each epoch, without a table of it in memory. Rank r of n gets the samples
    r, r + n, r + 2n, … of that order, so that no sample is lost or doubled, and the ranks' numbers of samples differ by
    at most one. When all ranks together have used k samples, `seek(k)` goes on there at once, with any number of ranks.

    Args:
        path: Folder of the files.
        name: Common start of their names. Any numbers may follow, with gaps and from any start.
        rank: This rank.
        world_size: Number of ranks.
        seed: Shuffles when given.
        epoch: Epoch to begin with.

    Raises:
        IndexedDatasetError: There is no such file, one is damaged, or their token types differ.
        ValueError: `rank` is not below `world_size`.
    """

    def __init__(
        self, path: StrPath, name: str, rank: int, world_size: int, *, seed: int | None = None, epoch: int = 0
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must lie between 0 and `world_size` - 1 ({world_size - 1}), but is {rank}")
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.files = [MMapIndexedDataset(prefix) for prefix in _numbered_files(Path(path), name)]
        first = self.files[0]
        for file in self.files:
            if file.dtype != first.dtype:
                raise IndexedDatasetError(
                    f"{file.prefix} holds {file.dtype.name}, but {first.prefix} {first.dtype.name}: not one data set"
                )
        self.dtype = first.dtype
        self._ends: IntArray = np.cumsum([len(file) for file in self.files], dtype=np.int64)
        self.total = int(self._ends[-1])
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go to an epoch.

        Args:
            epoch: Its number.
            start: How many samples of it all ranks together have used already.
        """
        if epoch < 0 or not 0 <= start <= self.total:
            raise ValueError(
                f"`epoch` must not be negative, and `start` lie in 0 to {self.total}, but they are {epoch}, {start}"
            )
        self.epoch, self.start = epoch, start
        self._order = None if self.seed is None else Permutation(self.total, self.seed, epoch)

    def seek(self, used: int) -> None:
        """Go to where training was when all ranks together had used so many samples, in all epochs.

        Args:
            used: Number of samples. The epoch and the place in it follow from it.
        """
        if not self.total:
            raise ValueError("`seek` needs at least one sample")
        self.set_epoch(*divmod(used, self.total))

    def __len__(self) -> int:
        """Return how many samples this rank has left in this epoch."""
        return max(0, -(-(self.total - self.start - self.rank) // self.world_size))

    @overload
    def __getitem__(self, index: int) -> Array: ...

    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...

    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        """Return one of this rank's samples, of shape (tokens,), or the list of a slice's."""
        if isinstance(index, slice):
            return self.gather(np.arange(*index.indices(len(self))))
        sample = self.sample_number(index)
        file = int(np.searchsorted(self._ends, sample, side="right"))
        return self.files[file][sample - int(self._ends[file])]

    def __iter__(self) -> Iterator[Array]:
        return map(self.__getitem__, range(len(self)))

    def sample_number(self, index: int) -> int:
        """Return the number, among all sequences of all files, of this rank's sample `index`.

        It is the same on any rank and in any run, so it can seed what is drawn for the sample.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"the index must lie in [-{len(self)}, {len(self)}), but is {index}")
        position = self.start + self.rank + (index % len(self)) * self.world_size
        return position if self._order is None else self._order[position]

    def gather(self, indices: npt.ArrayLike) -> list[Array]:
        """Return many of this rank's samples, a batch.

        Args:
            indices: Their numbers, of shape (batch,); negative ones count from the end.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not -len(self) <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(
                f"indices must lie in [-{len(self)}, {len(self)}), but are {wanted.min()} to {wanted.max()}"
            )
        samples = self.start + self.rank + np.where(wanted < 0, wanted + len(self), wanted) * self.world_size
        if self._order is not None:
            samples = self._order.gather(samples)
        files = np.searchsorted(self._ends, samples, side="right")
        batch: list[Array] = [self.files[0].tokens[:0]] * len(wanted)
        for file in np.unique(files).tolist():
            places = np.flatnonzero(files == file)
            # Counted from the end of the file: `_ends` is where the next one begins.
            for place, sequence in zip(
                places.tolist(), self.files[file].gather(samples[places] - self._ends[file]), strict=True
            ):
                batch[place] = sequence
        return batch


def _numbered_files(folder: Path, name: str) -> list[Path]:
    """Return the prefixes `<name>_<number>` in a folder, in the order of the numbers."""
    if not folder.is_dir():
        raise IndexedDatasetError(f"`path` must be the folder of the data sets, but {folder} is none")
    pattern = re.compile(rf"(\.?){re.escape(name)}_(\d+)\.(idx|commit)")
    found: dict[Path, int] = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        # A journal stands for a data set whose index may be missing until the renames are completed.
        if match and (match[1] == ".") == (match[3] == "commit"):
            prefix = folder / f"{name}_{match[2]}"
            complete_publication(prefix)
            found[prefix] = int(match[2])
    if not found:
        raise IndexedDatasetError(f"{folder}: there is no data set {name}_1, {name}_2, … (files {name}_<number>.idx)")
    return sorted(found, key=lambda prefix: (found[prefix], prefix.name))
