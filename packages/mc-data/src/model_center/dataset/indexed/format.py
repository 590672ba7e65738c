r"""The `MMIDIDX` version 1 layout of `.idx` files, as Megatron-LM and NeMo read and write it.

This is the only module that knows the bytes. A data set is `<prefix>.bin`, the tokens of all sequences one after the
other, and `<prefix>.idx`::

    magic b"MMIDIDX\0\0" | version u64 | dtype code u8 | number of sequences u64 | number of boundaries u64
    sizes      i32 x sequences     tokens of each sequence
    pointers   i64 x sequences     byte offset of each sequence in the .bin file
    boundaries i64 x boundaries    first sequence of each document, and at the end the number of sequences

Everything is little-endian. The codes of float32 and float64 follow Megatron (6 is float64), not the original
ModelCenter, which had them the other way round.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

StrPath: TypeAlias = str | os.PathLike[str]
Array: TypeAlias = npt.NDArray[Any]
IntArray: TypeAlias = npt.NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(
        ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"),
        start=1,
    )
}
SIZE_DTYPE = np.dtype("<i4")
POINTER_DTYPE = np.dtype("<i8")
MAX_SEQUENCE_LENGTH = int(np.iinfo(SIZE_DTYPE).max)

_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size


class IndexedDatasetError(ValueError):
    """An indexed data set is missing, damaged, or does not fit what is asked of it."""


def best_fitting_dtype(vocab_size: int | None = None) -> type[np.uint16] | type[np.int32]:
    """Return the token type that Megatron chooses for a vocabulary.

    Args:
        vocab_size: Number of token ids, or None when it is not known.

    Returns:
        `numpy.uint16` below 65,500 ids, otherwise `numpy.int32`.
    """
    return np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32


def dtype_code(dtype: npt.DTypeLike) -> int:
    """Return the code that stands for `dtype` in the header.

    Raises:
        ValueError: The format has no code for it.
    """
    wanted = np.dtype(dtype).newbyteorder("<")
    for code, known in DTYPES.items():
        if known == wanted:
            return code
    names = ", ".join(known.name for known in DTYPES.values())
    raise ValueError(f"`dtype` must be one of {names}, but is {np.dtype(dtype).name}")


def prefix_of(path: StrPath) -> Path:
    """Return the path without a trailing `.bin`, `.idx` or `.manifest.json`: what the files of one data set share."""
    name = os.fspath(path)
    suffix = next((suffix for suffix in (".bin", ".idx", ".manifest.json") if name.endswith(suffix)), "")
    return Path(name.removesuffix(suffix))


def file_of(prefix: StrPath, suffix: str) -> Path:
    """Return the file of a data set: `suffix` is `.bin`, `.idx` or `.manifest.json`."""
    return Path(f"{os.fspath(prefix)}{suffix}")


@dataclass(frozen=True)
class IndexHeader:
    """The fixed-size start of an `.idx` file.

    Attributes:
        dtype: Type of the tokens.
        sequences: Number of sequences.
        boundaries: Number of document boundaries, one more than the number of documents.
    """

    dtype: np.dtype[Any]
    sequences: int
    boundaries: int

    def pack(self) -> bytes:
        """Return the header's bytes."""
        return _HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), self.sequences, self.boundaries)

    @classmethod
    def unpack(cls, data: bytes, path: StrPath) -> IndexHeader:
        """Read the header.

        Args:
            data: The first `HEADER_BYTES` bytes of the file, or all of it when it is shorter.
            path: Named in errors.

        Raises:
            IndexedDatasetError: The bytes are not a header of this format, or of a version this reader knows.
        """
        if len(data) < HEADER_BYTES:
            raise IndexedDatasetError(f"{path}: an index starts with {HEADER_BYTES} bytes of header, found {len(data)}")
        magic, version, code, sequences, boundaries = _HEADER.unpack(data[:HEADER_BYTES])
        if magic != MAGIC:
            raise IndexedDatasetError(f"{path}: not an indexed data set: it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise IndexedDatasetError(f"{path}: this reader knows format version {VERSION}, the file has {version}")
        if code not in DTYPES:
            raise IndexedDatasetError(f"{path}: the dtype code must be 1 to {len(DTYPES)}, but is {code}")
        return cls(DTYPES[code], sequences, boundaries)

    @property
    def sizes_offset(self) -> int:
        """Byte offset of the sizes."""
        return HEADER_BYTES

    @property
    def pointers_offset(self) -> int:
        """Byte offset of the pointers."""
        return self.sizes_offset + self.sequences * SIZE_DTYPE.itemsize

    @property
    def boundaries_offset(self) -> int:
        """Byte offset of the document boundaries."""
        return self.pointers_offset + self.sequences * POINTER_DTYPE.itemsize

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.boundaries_offset + self.boundaries * POINTER_DTYPE.itemsize


def pointers_from_sizes(sizes: Array, dtype: np.dtype[Any]) -> IntArray:
    """Return the byte offset of every sequence when they lie one after the other."""
    pointers = np.zeros(len(sizes), dtype=POINTER_DTYPE)
    np.cumsum(sizes[:-1], dtype=POINTER_DTYPE, out=pointers[1:])
    pointers *= dtype.itemsize
    return pointers


def complete_boundaries(boundaries: Array, sequences: int) -> IntArray:
    """Return document boundaries that cover every sequence, as Megatron's reader demands.

    The original ModelCenter's files hold only what `end_document` was called for: a lone `[0]` means that nothing was
    marked, and then every sequence counts as one document; otherwise sequences after the last boundary are one more.
    """
    complete = np.asarray(boundaries, dtype=POINTER_DTYPE)
    if len(complete) <= 1:
        return np.arange(sequences + 1, dtype=POINTER_DTYPE)
    if complete[-1] != sequences:
        complete = np.append(complete, np.asarray(sequences, dtype=POINTER_DTYPE))
    return complete


def index_problem(
    sizes: Array, pointers: Array, boundaries: Array, dtype: np.dtype[Any], data_bytes: int
) -> str | None:
    """Check every entry of an index against the length of its `.bin` file.

    Returns:
        What is wrong, or None.
    """
    sequences = len(sizes)
    if sequences and int(sizes.min()) < 0:
        return f"sequence {int(sizes.argmin())} has a negative size, {int(sizes.min())}"
    wrong = pointers != pointers_from_sizes(sizes, dtype)
    if wrong.any():
        first = int(wrong.argmax())
        return f"the pointer of sequence {first}, {int(pointers[first])}, is not the end of the sequence before it"
    if sequences:
        end = int(pointers[-1]) + int(sizes[-1]) * dtype.itemsize
        if end != data_bytes:
            return f"its sequences end at byte {end} of the .bin file, which has {data_bytes}"
    if not len(boundaries) or boundaries[0] != 0:
        return "the first document boundary must be 0"
    if (np.diff(boundaries) < 0).any() or boundaries[-1] > sequences:
        return f"document boundaries must rise from 0 to the number of sequences ({sequences})"
    return None
