"""The sequences of a corpus under their global numbers, for an objective."""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model_center.dataset.indexed import DistributedMMapIndexedDataset, FullRows, MMapIndexedDataset
from model_center.dataset.indexed.objectives import Sample
from model_center.tokenizer import Tokenizer
from model_center.tools.reshaping import require_tokenizer

from .pretraining_objectives import PretrainingObjective

IntArray = npt.NDArray[np.int64]


class SampleError(ValueError):
    """A sample that the model cannot be trained on."""


class Corpus:
    """The samples that an objective makes of `<folder>/<name>_1`, `<folder>/<name>_2`, …; one for each sequence.

    Args:
        folder: Folder of the indexed data sets.
        name: Common start of their names.
        objective: What becomes of a sequence.
        seed: With the epoch and the number of a sample, decides what is drawn for it.
        tokenizer: Must be the one that made the files, where their manifests tell.

    Raises:
        ValueError: There are no such files, they are empty, or another tokenizer made them.
    """

    def __init__(
        self, folder: Path, name: str, objective: PretrainingObjective, *, seed: int, tokenizer: Tokenizer | None = None
    ) -> None:
        self.place, self.objective, self.seed = folder / name, objective, seed
        self._sequences = DistributedMMapIndexedDataset(folder, name, 0, 1)
        self.files: list[MMapIndexedDataset] = self._sequences.files
        if not len(self):
            raise ValueError(f"{self.place}: the data sets hold no samples")
        if tokenizer is not None:
            for file in self.files:
                require_tokenizer(file, tokenizer)

    def __len__(self) -> int:
        return len(self._sequences)

    def sizes(self, numbers: IntArray) -> IntArray:
        """Tokens of samples on each side, of shape (samples, sides), found without making the samples."""
        lengths = [self.objective.lengths(len(tokens)) for tokens in self._cut(numbers)]
        return np.array(lengths, dtype=np.int64).reshape(len(numbers), -1)

    def samples(self, numbers: IntArray, epoch: int) -> list[Sample]:
        """Make samples.

        Args:
            numbers: Which, of shape (samples,).
            epoch: Epoch that they belong to.

        Raises:
            SampleError: One holds an id outside the model's vocabulary.
        """
        sequences = self._cut(numbers)
        ends = np.cumsum([len(tokens) for tokens in sequences])
        flat = np.concatenate(sequences).astype(np.int64) if sequences else np.zeros(0, np.int64)
        self._check_ids(flat, ends, numbers)
        made = []
        for number, tokens in zip(numbers.tolist(), np.split(flat, ends[:-1]), strict=True):
            made.append(self.objective(tokens, np.random.default_rng([self.seed, epoch, number])))
        return made

    def _cut(self, numbers: IntArray) -> list[npt.NDArray[Any]]:
        return [self.objective.cut(tokens) for tokens in self._sequences.gather(numbers)]

    def _check_ids(self, flat: IntArray, ends: IntArray, numbers: IntArray) -> None:
        limit = self.objective.vocab_size
        if flat.size and not 0 <= flat.min() <= flat.max() < limit:
            at = int(((flat < 0) | (flat >= limit)).argmax())
            number = int(numbers[np.searchsorted(ends, at, side="right")])
            raise SampleError(
                f"{self.place}: sample {number} holds the id {flat[at]}, but the ids of the model and its tokenizer "
                f"are 0 to {limit - 1}"
            )

    @property
    def fingerprint(self) -> str:
        """Two corpora with the same one hold the same samples under the same numbers."""
        identity = [self.objective.fingerprint, type(self).__name__, self.seed, *map(_content, self.files)]
        return hashlib.sha256(repr(identity).encode()).hexdigest()


class RowCorpus(Corpus):
    """The same files as one stream of tokens, cut into rows of the objective's length: every sample is a full row."""

    def __init__(
        self, folder: Path, name: str, objective: PretrainingObjective, *, seed: int, tokenizer: Tokenizer | None = None
    ) -> None:
        if objective.options.objective != "causal":
            chosen = objective.options.objective
            raise ValueError(f"data.full_rows belongs to the objective causal, but that is {chosen}")
        sequences = DistributedMMapIndexedDataset(folder, name, 0, 1)
        self._rows = [FullRows(file, objective.options.max_length) for file in sequences.files]
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        super().__init__(folder, name, objective, seed=seed, tokenizer=tokenizer)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sizes(self, numbers: IntArray) -> IntArray:
        """Tokens of rows, of shape (samples, 1): all full, but the last of each file."""
        return np.array([[self._find(number)[2]] for number in numbers.tolist()], dtype=np.int64).reshape(-1, 1)

    def samples(self, numbers: IntArray, epoch: int) -> list[Sample]:  # noqa: ARG002  # nothing is drawn
        """Return rows, without the padding of a file's last one (see `Corpus.samples`)."""
        made = []
        for number in numbers.tolist():
            rows, row, size = self._find(number)
            made.append({name: values[:size] for name, values in rows[row].items()})
        ids = [sample["input_ids"] for sample in made]
        self._check_ids(
            np.concatenate(ids) if ids else np.zeros(0, np.int64), np.cumsum([len(row) for row in ids]), numbers
        )
        return made

    def _find(self, number: int) -> tuple[FullRows, int, int]:
        """The rows of a file, and number and tokens of a row among them."""
        file = int(np.searchsorted(self._ends, number, side="right"))
        rows = self._rows[file]
        row = number - int(self._ends[file]) + len(rows)
        return rows, row, min(rows.length, len(rows.source.tokens) - row * rows.length)


def _content(file: MMapIndexedDataset) -> Sequence[Any]:
    """What tells a data set from others: checksums where there is a manifest, else counts and the lengths."""
    if file.manifest is not None:
        return [asdict(record) for _, record in sorted(file.manifest.files.items())]
    return [file.dtype.name, len(file.tokens), zlib.crc32(file.sizes.tobytes()), zlib.crc32(file.doc_idx.tobytes())]
