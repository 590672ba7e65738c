"""Reading documents out of text files, part by part.

A part is a piece of one input that can be read without the others: a range of bytes of an uncompressed file, a row
group of a Parquet file, or a whole compressed file. Where parts begin depends on the inputs alone, never on how many
processes read them, which is what makes the result the same for any number.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

InputFormat = Literal["auto", "text", "jsonl", "parquet"]
BadBytes = Literal["error", "replace"]

_CHUNK_BYTES = 1 << 20
_SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst")
# Zstandard can make 32,768 times as much of its input, all of which one call returns.
_ZSTD_BYTES = 4096

UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading from `open_decompressed` raises where a file is cut off, damaged, or on a disk that is."""


class InputError(ValueError):
    """An input that cannot be read as told; the message names file and line."""


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read.

    Attributes:
        format: `text` is one document per line, `jsonl` one JSON object per line, `parquet` one row each; `auto`
            goes by the name of the file, and takes unknown ones for text.
        field: Name of the JSON field, or of the Parquet column, that holds the text.
        bad_bytes: What to do with invalid UTF-8: `error` stops with file and offset, `replace` puts U+FFFD and counts.
        part_bytes: About how much of an uncompressed file is one part: what a killed run may lose per worker.
    """

    format: InputFormat = "auto"
    field: str = "text"
    bad_bytes: BadBytes = "error"
    part_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        if self.part_bytes < 1:
            raise ValueError(f"`part_bytes` must be at least 1, but is {self.part_bytes}")

    def format_of(self, path: Path) -> str:
        """Return the format of one input."""
        if self.format != "auto":
            return self.format
        suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
        return _SUFFIXES.get(suffix, "text")


@dataclass(frozen=True)
class Part:
    """A piece of one input.

    Attributes:
        path: The input file.
        size: Its length in bytes when the run was planned.
        start: First byte, or row group.
        stop: End, exclusive. Lines belong to the part in which they begin.
        bytes: How much of the input it is, for progress.
    """

    path: str
    size: int
    start: int
    stop: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the values as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Some lines of a part, one after the other.

    Attributes:
        texts: The document of each line, or None where a line is blank.
        first: Number of the first line, counted from 0 at the start of the part.
        replaced: Number of invalid byte sequences that were replaced.
    """

    texts: Sequence[str | None]
    first: int
    replaced: int = 0


def plan_parts(path: Path, options: ReadOptions) -> list[Part]:
    """Divide one input into parts.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if options.format_of(path) == "parquet":
        groups = [(group, group + 1) for group in range(_parquet(path).num_row_groups)] or [(0, 0)]
        return [Part(str(path), size, start, stop, size // len(groups)) for start, stop in groups]
    step = max(1, size) if path.suffix in _COMPRESSED else options.part_bytes
    starts = range(0, max(1, size), step)
    return [Part(str(path), size, start, min(size, start + step), min(size - start, step)) for start in starts]


def read_part(part: Part, options: ReadOptions) -> Iterator[Batch]:
    """Read the documents of a part.

    Raises:
        InputError: The file changed since the run was planned, is damaged, or holds what the options do not allow.
    """
    path = Path(part.path)
    try:
        size = path.stat().st_size
        if size != part.size:
            raise InputError(f"{path}: had {part.size} bytes when the run was planned, now {size}; start it anew")
        if options.format_of(path) == "parquet":
            yield from _read_parquet(part, options)
        else:
            yield from _read_lines(part, options)
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def line_number(part: Part, line: int) -> str:
    """Return where a line of a part is, for messages: the path and the number counted from 1 in the whole file."""
    path = Path(part.path)
    if path.suffix == ".parquet":
        return f"{path}, row group {part.start}, row {line + 1}"
    before = 0
    if part.start:
        with path.open("rb") as stream:
            remaining = _line_start(stream, part.start)
            stream.seek(0)
            while remaining:
                chunk = stream.read(min(_CHUNK_BYTES, remaining))
                before += chunk.count(b"\n")
                remaining -= len(chunk)
    return f"{path}:{before + line + 1}"


def _line_start(stream: IO[bytes], offset: int) -> int:
    """Go to the first line that begins at or after `offset`."""
    if not offset:
        return 0
    stream.seek(offset - 1)
    stream.readline()
    return stream.tell()


def open_decompressed(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise InputError(
                f"{path}: reading .zst files needs the extra: pip install 'mc-preprocess[zstd]'"
            ) from error
        return io.BufferedReader(_ZstdFile(path.open("rb"), zstandard))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """A Zstandard file, decompressed; zstandard's own reader takes a file that is cut off for one that ends."""

    def __init__(self, file: IO[bytes], zstandard: ModuleType) -> None:
        self._zstandard = zstandard
        self._file = file
        self._pieces = self._decompress()
        self._left = memoryview(b"")

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read some bytes; 0 is the end."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        """Close the compressed file, too."""
        if not self.closed:
            self._file.close()
        super().close()

    def _decompress(self) -> Iterator[bytes]:
        """Decompress one frame after the other."""
        frame = None
        while data := self._file.read(_ZSTD_BYTES):
            while data:
                frame = frame or self._zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(data)
                except self._zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise EOFError("the compressed data is cut off")


def _read_lines(part: Part, options: ReadOptions) -> Iterator[Batch]:
    path = Path(part.path)
    jsonl = options.format_of(path) == "jsonl"
    compressed = path.suffix in _COMPRESSED
    line = 0
    with open_decompressed(path) as stream:
        position = _line_start(stream, part.start)
        while compressed or position < part.stop:
            chunk = stream.read(_CHUNK_BYTES if compressed else min(_CHUNK_BYTES, part.stop - position))
            if not chunk:
                break
            if not chunk.endswith(b"\n"):
                chunk += stream.readline()
            text, replaced = _decode(chunk, position, part, options)
            lines = text.removesuffix("\n").split("\n")
            if "\r" in text:
                lines = [value.removesuffix("\r") for value in lines]
            texts: list[str | None] = [None if not value or value.isspace() else value for value in lines]
            if jsonl:
                texts = [value and _document(value, part, line + i, options.field) for i, value in enumerate(texts)]
            yield Batch(texts, line, replaced)
            position += len(chunk)
            line += len(lines)


def _decode(chunk: bytes, position: int, part: Part, options: ReadOptions) -> tuple[str, int]:
    """Decode UTF-8, without the mark that some programs put at the start of a file."""
    if position == 0 and chunk.startswith(BOM_UTF8):
        chunk, position = chunk.removeprefix(BOM_UTF8), len(BOM_UTF8)
    try:
        return chunk.decode(), 0
    except UnicodeDecodeError as error:
        if options.bad_bytes == "error":
            raise InputError(
                f"{part.path}: invalid UTF-8 at byte {position + error.start} ({error.reason}); "
                "`bad_bytes: replace` puts U+FFFD instead and counts them"
            ) from None
    text = chunk.decode(errors="replace")
    return text, text.count("\ufffd") - chunk.count("\ufffd".encode())


def _document(line: str, part: Part, number: int, field: str) -> str | None:
    """Return the text of a line of JSON, or None where it is blank."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{line_number(part, number)}: not a JSON object: {error}") from None
    return _text_of(value, field, partial(line_number, part, number))


def _text_of(row: Any, field: str, where: Callable[[], str]) -> str | None:
    """Return the text field of a JSON object or a Parquet row."""
    if not isinstance(row, dict) or field not in row:
        names = (
            f"it has {', '.join(map(repr, row)) or 'none'}" if isinstance(row, dict) else f"found {type(row).__name__}"
        )
        raise InputError(f"{where()}: there is no field {field!r}; {names}")
    text = row[field]
    if not isinstance(text, str):
        raise InputError(f"{where()}: the field {field!r} must be a string, but is {type(text).__name__}")
    return text if text and not text.isspace() else None


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs the extra: pip install 'mc-preprocess[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file, or a damaged one ({error})") from error


def _read_parquet(part: Part, options: ReadOptions) -> Iterator[Batch]:
    file = _parquet(Path(part.path))
    if options.field not in file.schema_arrow.names:
        raise InputError(
            f"{part.path}: there is no column {options.field!r}; it has {', '.join(file.schema_arrow.names)}"
        )
    row = 0
    for rows in file.iter_batches(1024, row_groups=range(part.start, part.stop), columns=[options.field]):
        texts = []
        for number, value in enumerate(rows.column(0).to_pylist(), start=row):
            where = partial(line_number, part, number)
            texts.append(None if value is None else _text_of({options.field: value}, options.field, where))
        yield Batch(texts, row)
        row += len(texts)
