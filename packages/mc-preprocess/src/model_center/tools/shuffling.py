"""Shuffling the lines of files that are larger than memory."""

from __future__ import annotations

import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from model_center.dataset.indexed.durable import Staging, remove_stale, write_all

from .reading import UNREADABLE, InputError, open_decompressed

_CHUNK_BYTES = 4 << 20
_MOST_BUCKETS = 512
_TYPICAL_COMPRESSION = 8


def shuffle_lines(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    seed: int = 0,
    memory_bytes: int = 256 << 20,
    overwrite: bool = False,
) -> int:
    """Write the lines of all inputs, text or JSON lines, to one file in random order.

    Each line goes to one of several temporary files at random, and each of these is then shuffled in memory, so every
    order is equally likely, and memory is bounded. The order depends on the seed, the inputs and `memory_bytes`.

    Args:
        inputs: Files of lines, also compressed (`.gz`, `.zst`).
        output: The new file.
        seed: Chooses the order.
        memory_bytes: About how much memory to use.
        overwrite: Whether a file that exists is replaced, when the new one is complete.

    Returns:
        The number of lines.

    Raises:
        ValueError: An input cannot be read, or the output exists.
    """
    target = Path(output)
    if target.exists() and not overwrite:
        raise ValueError(f"`output`: {target} exists; `overwrite` replaces it")
    if memory_bytes < 1:
        raise ValueError(f"`memory_bytes` must be at least 1, but is {memory_bytes}")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    random = np.random.default_rng(seed)
    buckets = min(_MOST_BUCKETS, 1 + 4 * _total_bytes(inputs) // memory_bytes)
    lines = 0
    staging = Staging(target)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.buckets.") as folder:
            _fill_buckets(inputs, Path(folder), buckets, random)
            stream = staging.open("")
            for number in range(buckets):
                bucket = Path(folder) / str(number)
                content = bucket.read_bytes()
                ends = _line_ends(content)
                order = random.permutation(len(ends) - 1)
                for start in range(0, len(order), 1 << 16):
                    some = order[start : start + (1 << 16)]
                    pieces = zip(ends[some].tolist(), ends[some + 1].tolist(), strict=True)
                    write_all(stream, b"".join([content[begin:end] for begin, end in pieces]))
                lines += len(order)
                bucket.unlink()
        staging.sync()
        staging.replace()
    finally:
        staging.discard()
    return lines


def _total_bytes(inputs: Sequence[str | Path]) -> int:
    """Return about how many bytes of text the inputs hold."""
    total = 0
    for path in map(Path, inputs):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        total += size * (_TYPICAL_COMPRESSION if path.suffix in (".gz", ".zst") else 1)
    return total


def _fill_buckets(inputs: Sequence[str | Path], folder: Path, buckets: int, random: np.random.Generator) -> None:
    """Write every line to a bucket at random."""
    with ExitStack() as stack:
        streams = [stack.enter_context((folder / str(number)).open("wb")) for number in range(buckets)]
        for path in map(Path, inputs):
            for chunk in _chunks(path):
                ends = _line_ends(chunk)
                choice = random.integers(buckets, size=len(ends) - 1)
                order = np.argsort(choice, kind="stable")
                pieces = [chunk[a:b] for a, b in zip(ends[order].tolist(), ends[order + 1].tolist(), strict=True)]
                first = 0
                for stream, count in zip(streams, np.bincount(choice, minlength=buckets).tolist(), strict=True):
                    stream.write(b"".join(pieces[first : first + count]))
                    first += count


def _chunks(path: Path) -> Iterator[bytes]:
    """Read whole lines, some megabytes at a time; the last line of the file gets its line break if it has none."""
    try:
        with open_decompressed(path) as stream:
            # The mark that some programs put at the start of a file would land in the middle of the new one.
            start = stream.read(len(BOM_UTF8)).removeprefix(BOM_UTF8)
            while chunk := start + stream.read(_CHUNK_BYTES - len(start)):
                start = b""
                if not chunk.endswith(b"\n"):
                    chunk += stream.readline()
                yield chunk if chunk.endswith(b"\n") else chunk + b"\n"
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _line_ends(content: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return 0 and the end of every line, of shape (lines + 1,)."""
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")).astype(np.int64)
    return np.concatenate([np.zeros(1, np.int64), ends + 1])
