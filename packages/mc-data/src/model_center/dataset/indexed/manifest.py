"""The sidecar `<prefix>.manifest.json`: counts, checksums and where a data set came from.

Megatron ignores the file; a data set without one is read all the same, only its checksums cannot be verified.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .durable import write_all
from .format import IndexedDatasetError

MANIFEST_FORMAT = "model_center.indexed_dataset"
MANIFEST_VERSION = 1
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """Length and checksums of one file.

    Attributes:
        bytes: Length of the file.
        crc32: CRC-32 of every block of `Manifest.block_bytes` bytes, 8 hexadecimal digits each, one after the other.
    """

    bytes: int
    crc32: str

    @classmethod
    def of(cls, data: memoryview) -> FileRecord:
        """Return the record of a file whose content is `data`."""
        starts = range(0, len(data), BLOCK_BYTES)
        return cls(len(data), "".join(f"{zlib.crc32(data[start : start + BLOCK_BYTES]):08x}" for start in starts))

    def damaged_blocks(self, stream: BinaryIO, block_bytes: int) -> list[int]:
        """Read a file and return the numbers of the blocks whose checksum differs."""
        return [
            block
            for block in range(-(-self.bytes // block_bytes))
            if f"{zlib.crc32(stream.read(block_bytes)):08x}" != self.crc32[8 * block : 8 * block + 8]
        ]


class RecordingWriter:
    """Writes to an unbuffered stream and keeps the `FileRecord` of what went through."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._bytes = 0
        self._checksums: list[str] = []
        self._checksum = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        write_all(self._stream, view)
        while view:
            part = view[: BLOCK_BYTES - self._bytes % BLOCK_BYTES]
            self._checksum = zlib.crc32(part, self._checksum)
            self._bytes += len(part)
            if self._bytes % BLOCK_BYTES == 0:
                self._checksums.append(f"{self._checksum:08x}")
                self._checksum = 0
            view = view[len(part) :]

    def record(self) -> FileRecord:
        """Return what was written so far."""
        last = [f"{self._checksum:08x}"] if self._bytes % BLOCK_BYTES else []
        return FileRecord(self._bytes, "".join(self._checksums + last))


@dataclass(frozen=True)
class Manifest:
    """What is known of a data set beside its index.

    Attributes:
        dtype: Name of the token type.
        sequences: Number of sequences.
        documents: Number of documents.
        tokens: Number of tokens.
        files: Record of the `.bin` and of the `.idx` file, by suffix.
        block_bytes: Bytes that one checksum covers.
        provenance: Where the data came from, such as tokenizer (name, fingerprint), command and sources.
    """

    dtype: str
    sequences: int
    documents: int
    tokens: int
    files: Mapping[str, FileRecord]
    block_bytes: int = BLOCK_BYTES
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the file's content, which ends with a checksum of the rest."""
        content = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **asdict(self)}
        return json.dumps(content | {"checksum": checksum_of(content)}, indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> Manifest:
        """Read a manifest.

        Args:
            data: The file's content.
            path: Named in errors.

        Raises:
            IndexedDatasetError: It is damaged, or of a version this reader does not know.
        """
        try:
            content = json.loads(data)
            checksum = content.pop("checksum")
            name, version = content.pop("format"), content.pop("version")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise IndexedDatasetError(f"{path}: not a manifest, or a damaged one ({error})") from error
        if name != MANIFEST_FORMAT or version != MANIFEST_VERSION:
            raise IndexedDatasetError(
                f"{path}: this reader knows {MANIFEST_FORMAT!r} version {MANIFEST_VERSION}, found {name!r} {version!r}"
            )
        if checksum != checksum_of({"format": name, "version": version, **content}):
            raise IndexedDatasetError(f"{path}: damaged: its content does not have the checksum {checksum!r}")
        content["files"] = {suffix: FileRecord(**record) for suffix, record in content["files"].items()}
        return cls(**content)


def checksum_of(content: Mapping[str, Any]) -> str:
    """Return the CRC-32 of the canonical form of what JSON can hold."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
