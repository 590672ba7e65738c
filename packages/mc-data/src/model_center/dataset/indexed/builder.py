"""Writing an indexed data set: it appears complete, or not at all."""

from __future__ import annotations

import warnings
import weakref
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsInt

import numpy as np
import numpy.typing as npt

from .durable import Staging, remove_stale
from .format import (
    MAX_SEQUENCE_LENGTH,
    POINTER_DTYPE,
    SIZE_DTYPE,
    Array,
    IndexHeader,
    StrPath,
    complete_boundaries,
    dtype_code,
    pointers_from_sizes,
    prefix_of,
)
from .manifest import BLOCK_BYTES, FileRecord, Manifest, RecordingWriter
from .reader import MMapIndexedDataset


class MMapIndexedDatasetBuilder:
    """Writes `<prefix>.bin`, `<prefix>.idx` and `<prefix>.manifest.json`.

    Nothing is visible under these names before `finalize`, and a data set that is there already stays as it is until
    then, also when the process is killed. As a context manager it finalizes at the end of the block, and drops
    everything when the block raises.

    Args:
        path: The `.bin` file, or the common prefix of the files.
        dtype: Type of the tokens in the file.
        provenance: What the manifest is to say of the data's origin; any JSON values.
        sync: Whether `finalize` waits until the disk has the files. Without it a killed process still damages nothing,
            but a power cut may.

    Raises:
        ValueError: The format has no code for `dtype`.
    """

    def __init__(
        self,
        path: StrPath,
        dtype: npt.DTypeLike = np.int32,
        *,
        provenance: Mapping[str, Any] | None = None,
        sync: bool = True,
    ) -> None:
        dtype_code(dtype)
        self.prefix = prefix_of(path)
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        self.provenance = dict(provenance or {})
        self._sync = sync
        remove_stale(self.prefix)
        self._staging = Staging(self.prefix)
        self._discard = weakref.finalize(self, self._staging.discard)
        self._data = RecordingWriter(self._staging.open(".bin"))
        self._buffer = np.empty(BLOCK_BYTES // self.dtype.itemsize, dtype=self.dtype)
        self._filled = 0
        self._typecode = "d" if self.dtype.kind == "f" else self.dtype.char
        self._fast_checks = _fast_checks(self.dtype)
        self._sizes = array("i")
        self._boundaries = array("q", [0])

    def __len__(self) -> int:
        return len(self._sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._discard.alive:
            self.finalize()

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """Append one sequence.

        Args:
            tokens: One-dimensional: a list, a numpy array, or anything numpy can convert, such as a CPU tensor.

        Raises:
            ValueError: A value does not fit the data set's dtype, or the builder is closed. Nothing was appended.
        """
        values = self._checked(tokens)
        if values.size > MAX_SEQUENCE_LENGTH:
            raise ValueError(
                f"a sequence may have {MAX_SEQUENCE_LENGTH} tokens, but item {len(self)} has {values.size}"
            )
        self._append(values)
        self._sizes.append(values.size)

    def add_items(self, items: Iterable[npt.ArrayLike]) -> None:
        """Append many sequences at once: much faster than one call for each.

        Args:
            items: Sequences as `add_item` takes them. All are held in memory together.

        Raises:
            ValueError: As in `add_item`; nothing was appended.
        """
        arrays = [np.asarray(item) for item in items]
        arrays = [item if item.size else item.astype(self.dtype) for item in arrays]
        if arrays:
            self.add_flat(np.concatenate(arrays), [len(item) for item in arrays])

    def add_flat(self, tokens: npt.ArrayLike, sizes: npt.ArrayLike) -> None:
        """Append many sequences that already lie one after the other: the fastest way.

        Args:
            tokens: The tokens of all sequences, of shape (sum of sizes,).
            sizes: Number of tokens of each sequence, of shape (sequences,).

        Raises:
            ValueError: As in `add_item`, or the sizes do not add up; nothing was appended.
        """
        lengths = np.asarray(sizes, dtype=np.int64)
        values = self._checked(tokens)
        if lengths.size and not 0 <= int(lengths.min()) <= int(lengths.max()) <= MAX_SEQUENCE_LENGTH:
            raise ValueError(
                f"`sizes` must lie between 0 and {MAX_SEQUENCE_LENGTH}, found {lengths.min()} to {lengths.max()}"
            )
        if int(lengths.sum()) != values.size:
            raise ValueError(f"`sizes` must add up to the {values.size} tokens given, but add up to {lengths.sum()}")
        self._append(values)
        self._sizes.frombytes(lengths.astype(np.int32).tobytes())

    def end_document(self) -> None:
        """Mark that the sequences since the last call are one document.

        Without any call every sequence counts as a document.
        """
        self._boundaries.append(len(self._sizes))

    def add_boundaries(self, boundaries: Iterable[SupportsInt]) -> None:
        """Mark many documents at once.

        Args:
            boundaries: For each document the number of sequences, counted from the start, at which it ends.

        Raises:
            ValueError: They do not rise from the last boundary to at most the number of sequences.
        """
        ends = [int(end) for end in boundaries]
        steps = np.diff([self._boundaries[-1], *ends])
        if (steps < 0).any() or (ends and ends[-1] > len(self)):
            raise ValueError(
                f"`boundaries` must rise from {self._boundaries[-1]} to at most {len(self)}, found {ends[:5]}…"
            )
        self._boundaries.extend(ends)

    def merge_file_(self, another_file: StrPath) -> None:
        """Append all sequences and documents of another data set.

        Args:
            another_file: Its prefix, or its `.bin` file.

        Raises:
            ValueError: Its dtype differs.
        """
        other = MMapIndexedDataset(another_file)
        if other.dtype != self.dtype:
            raise ValueError(f"`another_file` must hold {self.dtype.name}, but {other.prefix} holds {other.dtype.name}")
        if len(self):
            self._boundaries = array("q", complete_boundaries(np.asarray(self._boundaries), len(self)).tolist())
        start = len(self)
        for begin in range(0, len(other.tokens), len(self._buffer)):
            block = other.tokens[begin : begin + len(self._buffer)]
            other.touched(1, len(block))
            self._append(block)
        self._sizes.frombytes(other.sizes.astype(np.int32).tobytes())
        self._boundaries.extend((complete_boundaries(other.doc_idx, len(other))[1:] + start).tolist())

    def finalize(self, idx_file: StrPath | None = None) -> None:
        """Complete the files and let them appear.

        Args:
            idx_file: The `.idx` file, as in Megatron; it must belong to the data file.

        Raises:
            ValueError: `idx_file` belongs to another data set, or the builder is closed.
        """
        self._require_open()
        if idx_file is not None and prefix_of(idx_file) != self.prefix:
            raise ValueError(f"`idx_file` must be {self.prefix}.idx, beside its .bin file, but is {idx_file}")
        try:
            self._flush()
            self._write_index()
            self._staging.commit(sync=self._sync)
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop everything; a data set that was there before stays."""
        self._discard()

    def _require_open(self) -> None:
        if not self._discard.alive:
            raise ValueError(f"the builder of {self.prefix} is closed: it was finalized or aborted")

    def _write_index(self) -> None:
        """Stage the index and the manifest."""
        boundaries = np.asarray(self._boundaries, dtype=POINTER_DTYPE)
        if len(boundaries) == 1:
            boundaries = complete_boundaries(boundaries, len(self))
        elif boundaries[-1] != len(self):
            warnings.warn(
                f"{self.prefix}: the last {len(self) - boundaries[-1]} sequences belong to no document, and Megatron "
                "refuses such files; call end_document() after each document",
                stacklevel=3,
            )
        sizes = np.asarray(self._sizes, dtype=SIZE_DTYPE)
        stage_index(self._staging, self.dtype, sizes, boundaries, self._data.record(), self.provenance)

    def _checked(self, tokens: npt.ArrayLike) -> Array:
        """Return `tokens` as an array whose values all fit the dtype."""
        self._require_open()
        values = self._from_list(tokens) if isinstance(tokens, list) else np.asarray(tokens)
        if values.dtype == self.dtype and values.ndim == 1:
            return values
        fast = self._fast_checks.get(values.dtype)
        # Seen as unsigned, a negative number is a large one, so that one comparison does for most items.
        if fast is None or values.ndim != 1 or not len(values) or np.maximum.reduce(values.view(fast[0])) > fast[1]:
            self._check(values)
        return values

    def _from_list(self, tokens: list[Any]) -> Array:
        """Convert a list; the machine's own arrays do so, with a check of the range, faster than numpy."""
        try:
            return np.frombuffer(array(self._typecode, tokens), self._typecode)
        except (TypeError, OverflowError):
            return np.asarray(tokens)

    def _check(self, values: Array) -> None:
        """Raise a ValueError when something does not fit, which names what."""
        if values.ndim != 1:
            raise ValueError(f"`tokens` must have one dimension, but item {len(self)} has shape {values.shape}")
        if not values.size:
            return
        if values.dtype.kind not in ("iuf" if self.dtype.kind == "f" else "iu"):
            raise ValueError(
                f"`tokens` must be {self.dtype.name} values, but item {len(self)} has {values.dtype} values"
            )
        if np.can_cast(values.dtype, self.dtype):
            return
        if self.dtype.kind == "f":
            with np.errstate(over="ignore"):
                if (np.isinf(values.astype(self.dtype)) & ~np.isinf(values)).any():
                    raise ValueError(f"`tokens` must fit {self.dtype.name}, but item {len(self)} holds larger values")
            return
        limits = np.iinfo(self.dtype)
        smallest, largest = values.min(), values.max()
        if smallest < limits.min or largest > limits.max:
            wrong = smallest if smallest < limits.min else largest
            raise ValueError(
                f"`tokens` must fit {self.dtype.name} ({limits.min} to {limits.max}), item {len(self)} holds {wrong}"
            )

    def _append(self, values: Array) -> None:
        """Copy checked values into the block buffer, writing each block that gets full."""
        try:
            while len(values):
                part = values[: len(self._buffer) - self._filled]
                self._buffer[self._filled : self._filled + len(part)] = part
                self._filled += len(part)
                values = values[len(part) :]
                if self._filled == len(self._buffer):
                    self._flush()
        except BaseException:  # half an item may be written: what follows must not complete such a file
            self.abort()
            raise

    def _flush(self) -> None:
        self._data.write(self._buffer[: self._filled].data)
        self._filled = 0


def _fast_checks(dtype: np.dtype[Any]) -> dict[np.dtype[Any], tuple[str, int]]:
    """For each integer type, its unsigned form, and the largest value that fits `dtype` without a closer look."""
    if dtype.kind == "f":
        return {}
    largest = int(np.iinfo(dtype).max)
    return {np.dtype(kind + size): ("u" + size, largest) for size in "1248" for kind in "iu"}


def stage_index(
    staging: Staging,
    dtype: np.dtype[Any],
    sizes: Array,
    boundaries: Array,
    data: FileRecord,
    provenance: Mapping[str, Any],
) -> None:
    """Write the `.idx` file and the manifest that belong to a `.bin` file.

    Args:
        staging: Where they are staged.
        dtype: Type of the tokens.
        sizes: Number of tokens of each sequence, of shape (sequences,).
        boundaries: Document boundaries, of shape (documents + 1,).
        data: What the `.bin` file holds.
        provenance: What the manifest is to say of the data's origin.
    """
    index = RecordingWriter(staging.open(".idx"))
    index.write(IndexHeader(dtype, len(sizes), len(boundaries)).pack())
    for part in (sizes, pointers_from_sizes(sizes, dtype), boundaries):
        index.write(part.tobytes())
    manifest = Manifest(
        dtype=dtype.name,
        sequences=len(sizes),
        documents=len(boundaries) - 1,
        tokens=data.bytes // dtype.itemsize,
        files={".bin": data, ".idx": index.record()},
        provenance=provenance,
    )
    RecordingWriter(staging.open(".manifest.json")).write(manifest.to_json())


def make_builder(
    path: StrPath, impl: str = "mmap", dtype: npt.DTypeLike = np.int32, *, provenance: Mapping[str, Any] | None = None
) -> MMapIndexedDatasetBuilder:
    """Return a builder of the data set whose `.bin` file is `path`.

    Args:
        path: The `.bin` file, or the common prefix of the files.
        impl: How the data set is stored: `"mmap"` is the only way.
        dtype: Type of the tokens in the file; `best_fitting_dtype` chooses one.
        provenance: What the manifest is to say of the data's origin.

    Raises:
        ValueError: `impl` or `dtype` is unknown.
    """
    if impl != "mmap":
        raise ValueError(f'`impl` must be "mmap", but is {impl!r}')
    return MMapIndexedDatasetBuilder(Path(path), dtype, provenance=provenance)
