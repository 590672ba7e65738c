"""Reading an indexed data set through memory maps."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from .durable import complete_publication, is_same_file
from .format import (
    HEADER_BYTES,
    POINTER_DTYPE,
    SIZE_DTYPE,
    Array,
    IndexedDatasetError,
    IndexHeader,
    IntArray,
    StrPath,
    file_of,
    index_problem,
    prefix_of,
)
from .manifest import Manifest

CHECKED_AT_OPEN = 1 << 16
MAPPED_BYTES = 256 << 20
_FAULT_BYTES = 64 << 10  # what Linux maps around an address that is touched
_RETRIES = 100


class MMapIndexedDataset(Sequence[Array]):
    """The sequences of `<prefix>.bin` and `<prefix>.idx`.

    Opening compares the header's counts, the last sequence and the manifest's counts with the lengths of the files,
    and up to 65,536 sequences every entry of the index; it takes about a millisecond at any size. Every later read is
    checked against the length of the file. `verify_dataset` checks everything, checksums included.

    Sequences are read-only views of the map, without a copy; they stay valid when the data set object goes. Worker
    processes get the path and open the files themselves.

    Args:
        path: The common prefix of the files, or one of them.
        use_manifest: Whether a manifest, if there is one, must fit the files.

    Raises:
        IndexedDatasetError: A file is missing, damaged, or does not fit the others.
    """

    def __init__(self, path: StrPath, *, use_manifest: bool = True) -> None:
        self.prefix: Path = prefix_of(path)
        self._use_manifest = use_manifest
        index, data, manifest = _open_files(self.prefix)
        with index, data:
            self._map(index, data)
        self.manifest: Manifest | None = None
        if manifest is not None and use_manifest:
            self.manifest = Manifest.from_json(manifest, file_of(self.prefix, ".manifest.json"))
            self._check_manifest(self.manifest)

    def _map(self, index: BinaryIO, data: BinaryIO) -> None:
        """Map both files and check what the lengths of the files tell."""
        name = file_of(self.prefix, ".idx")
        header = IndexHeader.unpack(index.read(HEADER_BYTES), name)
        index_bytes, data_bytes = index.seek(0, 2), data.seek(0, 2)
        if header.file_bytes != index_bytes:
            raise IndexedDatasetError(
                f"{name}: {header.sequences} sequences and {header.boundaries} document boundaries take "
                f"{header.file_bytes} bytes, but the file has {index_bytes}"
            )
        if not header.boundaries:
            raise IndexedDatasetError(f"{name}: there must be at least one document boundary")
        self.dtype: np.dtype[Any] = header.dtype
        buffer = memoryview(mmap.mmap(index.fileno(), 0, access=mmap.ACCESS_READ))
        self.sizes: npt.NDArray[np.int32] = np.frombuffer(buffer, SIZE_DTYPE, header.sequences, header.sizes_offset)
        self.pointers: IntArray = np.frombuffer(buffer, POINTER_DTYPE, header.sequences, header.pointers_offset)
        self.doc_idx: IntArray = np.frombuffer(buffer, POINTER_DTYPE, header.boundaries, header.boundaries_offset)
        # Views of machine integers give Python integers, several times faster than elements of an array.
        self._size_view = buffer[header.sizes_offset : header.pointers_offset].cast("i")
        self._pointer_view = buffer[header.pointers_offset : header.boundaries_offset].cast("q")
        self._data_bytes = data_bytes
        if data_bytes % self.dtype.itemsize:
            raise IndexedDatasetError(
                f"{file_of(self.prefix, '.bin')}: {data_bytes} bytes are no whole number of {self.dtype.name} tokens"
            )
        self.tokens: Array = np.empty(0, self.dtype)
        if data_bytes:
            self._data_map = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ)
            self.tokens = np.frombuffer(self._data_map, self.dtype)
        self._is_large = data_bytes > MAPPED_BYTES
        self._touched_bytes = 0
        if header.sequences > CHECKED_AT_OPEN:
            end = int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
            problem = None if end == data_bytes else f"its sequences end at byte {end} of {data_bytes} in the .bin file"
        else:
            problem = index_problem(self.sizes, self.pointers, self.doc_idx, self.dtype, data_bytes)
        if problem:
            raise IndexedDatasetError(f"{name}: {problem}")

    def _check_manifest(self, manifest: Manifest) -> None:
        """Compare the manifest with the files: another program may have replaced them."""
        found = (self.dtype.name, len(self), len(self.doc_idx) - 1, len(self.tokens))
        told = (manifest.dtype, manifest.sequences, manifest.documents, manifest.tokens)
        if found != told:
            raise IndexedDatasetError(
                f"{file_of(self.prefix, '.manifest.json')}: tells of (dtype, sequences, documents, tokens) {told}, but "
                f"the files have {found}: they were replaced without it; `mc-preprocess repair` writes a new one"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.prefix, "use_manifest": self._use_manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a worker opens the files anew

    def __repr__(self) -> str:
        sizes = f"{len(self)} sequences, {len(self.tokens)} {self.dtype.name} tokens"
        return f"MMapIndexedDataset({str(self.prefix)!r}): {sizes}"

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Array: ...

    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...

    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        """Return one sequence, of shape (tokens,), or the list of a slice's sequences."""
        if isinstance(index, slice):
            return self.gather(np.arange(*index.indices(len(self))))
        try:
            start, size = self._pointer_view[index], self._size_view[index]
        except IndexError:
            raise IndexError(f"the index must lie in [-{len(self)}, {len(self)}), but is {index}") from None
        begin, odd = divmod(start, self.dtype.itemsize)
        if odd or begin < 0 or size < 0 or start + size * self.dtype.itemsize > self._data_bytes:
            raise self._outside(index)
        if self._is_large:
            self.touched(1, size)
        return self.tokens[begin : begin + size]

    def __iter__(self) -> Iterator[Array]:
        return map(self.__getitem__, range(len(self)))

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Array:
        """Return a part of one sequence.

        Args:
            idx: Number of the sequence.
            offset: First token wanted.
            length: Number of tokens wanted, or None for all that follow.

        Raises:
            ValueError: The sequence does not have these tokens.
        """
        sequence = self[idx]
        stop = len(sequence) if length is None else offset + length
        if not 0 <= offset <= stop <= len(sequence):
            raise ValueError(
                f"`offset` and `length` must lie in the {len(sequence)} tokens of {idx}, found {offset}, {length}"
            )
        return sequence[offset:stop]

    def gather(self, indices: npt.ArrayLike) -> list[Array]:
        """Return many sequences, a batch, several times faster than one by one.

        Args:
            indices: Their numbers, of shape (batch,); negative ones count from the end.

        Raises:
            IndexError: A number is out of range.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if not wanted.size:
            return []
        starts, sizes = self.pointers[wanted], self.sizes[wanted].astype(np.int64)
        ends = starts + sizes * self.dtype.itemsize
        if starts.min() < 0 or sizes.min() < 0 or ends.max() > self._data_bytes or (starts % self.dtype.itemsize).any():
            wrong = (starts < 0) | (sizes < 0) | (ends > self._data_bytes) | (starts % self.dtype.itemsize != 0)
            raise self._outside(int(wanted[wrong.argmax()]))
        if self._is_large:
            self.touched(len(wanted), int(sizes.sum()))
        starts //= self.dtype.itemsize
        tokens = self.tokens
        return [tokens[begin:end] for begin, end in zip(starts.tolist(), (starts + sizes).tolist(), strict=True)]

    def gather_flat(self, indices: npt.ArrayLike) -> tuple[Array, IntArray]:
        """Copy many sequences into one array.

        Args:
            indices: Their numbers, of shape (batch,).

        Returns:
            Tokens, one sequence after the other, and the offsets, of shape (batch + 1,), at which they begin and end.
        """
        sequences = self.gather(indices)
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
        return np.concatenate(sequences) if sequences else self.tokens[:0].copy(), offsets

    def touched(self, places: int, tokens: int) -> None:
        """Count what is read of the map, so that a data set larger than memory does not come to fill it.

        From time to time the process lets go of the pages (the system keeps them as long as it has room), which takes
        nothing from arrays that were handed out: they are mapped again when used. Reading `tokens` directly needs this.

        Args:
            places: How many sequences or blocks are read.
            tokens: How many tokens they have together.
        """
        self._touched_bytes += places * _FAULT_BYTES + tokens * self.dtype.itemsize
        if self._is_large and self._touched_bytes > MAPPED_BYTES:
            self._data_map.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = 0

    @staticmethod
    def exists(path: StrPath) -> bool:
        """Whether there is a complete data set at `path`, its prefix."""
        prefix = prefix_of(path)
        complete_publication(prefix)
        return file_of(prefix, ".idx").exists() and file_of(prefix, ".bin").exists()

    def _outside(self, index: int) -> IndexedDatasetError:
        return IndexedDatasetError(
            f"{file_of(self.prefix, '.idx')}: sequence {index} should have {self.sizes[index]} tokens from byte "
            f"{self.pointers[index]} on, which does not lie in the .bin file of {self._data_bytes} bytes"
        )


def _open_files(prefix: Path) -> tuple[BinaryIO, BinaryIO, bytes | None]:
    """Open the files of one generation of a data set, also while a writer is replacing it."""
    paths = {suffix: file_of(prefix, suffix) for suffix in (".idx", ".bin", ".manifest.json")}
    for attempt in range(_RETRIES):
        complete_publication(prefix)
        try:
            index = paths[".idx"].open("rb")
        except FileNotFoundError:
            # Between two renames the index is missing for an instant; where there is no data either, nothing is.
            if attempt < _RETRIES - 1 and paths[".bin"].exists():
                time.sleep(0.001)
                continue
            raise IndexedDatasetError(f"{paths['.idx']}: there is no such index") from None
        try:
            data = paths[".bin"].open("rb")
            try:
                manifest = paths[".manifest.json"].read_bytes()
            except FileNotFoundError:
                manifest = None
        except FileNotFoundError:
            index.close()
            if paths[".idx"].exists() and attempt == _RETRIES - 1:
                raise IndexedDatasetError(f"{paths['.bin']}: the index is there, but not its data") from None
            continue
        # A publication takes the index away before it touches anything else: the same index, the same generation.
        if is_same_file(index.fileno(), paths[".idx"]):
            return index, data, manifest
        index.close()
        data.close()
    raise IndexedDatasetError(f"{prefix}: the files are replaced faster than they can be opened")
