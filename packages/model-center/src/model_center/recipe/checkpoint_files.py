"""The directory of checkpoints: which ones are whole, what is wrong with the others, and how they come and go.

step-00001000/       a checkpoint; it takes this name when every file of it, and at last its manifest, is on disk
.step-*.writing      one that is being written, or whose writer was killed
.step-*.replaced     the previous one of the same step, while the new one takes its name; without step-*, it counts
.step-*.removed      one that is being deleted
.lock                locked while a checkpoint is being written
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from model_center.dataset.indexed.durable import sync_directory
from model_center.dataset.indexed.manifest import BLOCK_BYTES, FileRecord, checksum_of

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"
MANIFEST_FORMAT = "model_center.checkpoint"
FORMAT_VERSION = 1
_NAME = re.compile(r"step-\d{8,}|\.(step-\d{8,})\.replaced")
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True)
class Damage:
    """What keeps a directory from being a whole checkpoint.

    Attributes:
        path: The checkpoint.
        file: Name of the file in it.
        reason: What is wrong with the file.
    """

    path: Path
    file: str
    reason: str

    def __str__(self) -> str:
        """All of it in one line."""
        return f"{self.path.name}/{self.file}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """What a directory of checkpoints holds.

    Attributes:
        path: The newest whole checkpoint, None if there is none.
        damaged: Every damaged file of the others.
    """

    path: Path | None
    damaged: tuple[Damage, ...] = ()


class DamagedManifestError(ValueError):
    """A manifest that is missing or does not hold what was written."""


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint consists of.

    Attributes:
        step: Training steps done.
        sequence: Number of the checkpoint in order of writing; after going back to an earlier step, steps repeat.
        score: Validation loss, if it was measured.
        world_size: Number of processes that wrote it.
        engine: Name of their engine.
        model: Class of the model.
        versions: Version of each package.
        files: Length and checksums of every other file.
        block_bytes: Bytes that one checksum covers.
    """

    step: int
    sequence: int
    score: float | None
    world_size: int
    engine: str
    model: str
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    block_bytes: int = BLOCK_BYTES

    def to_json(self) -> bytes:
        """Return the content of the file, which ends with a checksum of the rest."""
        content = {"format": MANIFEST_FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content | {"checksum": checksum_of(content)}, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read the manifest of a checkpoint.

        Raises:
            DamagedManifestError: there is none, or it is damaged.
            ValueError: it is of a newer format.
        """
        path = checkpoint / MANIFEST_NAME
        try:
            content = json.loads(path.read_bytes())
            checksum, name, version = (content.pop(key) for key in ("checksum", "format", "format_version"))
        except FileNotFoundError:
            raise DamagedManifestError("missing") from None
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise DamagedManifestError(f"not a manifest, or a damaged one ({error})") from error
        if name != MANIFEST_FORMAT:
            raise DamagedManifestError(f"of the format {name!r}, must be {MANIFEST_FORMAT!r}")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, but this version of model-center reads up to {FORMAT_VERSION}; "
                "update model-center"
            )
        if checksum != checksum_of({"format": name, "format_version": version, **content}):
            raise DamagedManifestError(f"damaged: its content does not have the checksum {checksum!r}")
        content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        return cls(**content)

    def damages(self, checkpoint: Path, file: str, *, verify: bool) -> Iterator[Damage]:
        """Yield what is wrong with one file; its checksums are looked at if `verify`."""
        record, path = self.files[file], checkpoint / file
        try:
            size = path.stat().st_size
            if size != record.bytes:
                kind = "truncated" if size < record.bytes else "too long"
                yield Damage(checkpoint, file, f"{kind}: {size} bytes, must be {record.bytes}")
            elif verify:
                with path.open("rb") as stream:
                    for block in record.damaged_blocks(stream, self.block_bytes):
                        first, last = block * self.block_bytes, min((block + 1) * self.block_bytes, record.bytes) - 1
                        yield Damage(checkpoint, file, f"bytes {first} to {last} do not have their checksum")
        except FileNotFoundError:
            yield Damage(checkpoint, file, "missing")
        except OSError as error:
            yield Damage(checkpoint, file, f"cannot be read ({error.strerror})")


def damages_of(checkpoint: Path, *, verify: bool) -> list[Damage]:
    """Return everything that is wrong with a checkpoint.

    Raises:
        ValueError: it is of a newer format.
    """
    try:
        manifest = Manifest.read(checkpoint)
    except DamagedManifestError as error:
        return [Damage(checkpoint, MANIFEST_NAME, str(error))]
    return [damage for file in manifest.files for damage in manifest.damages(checkpoint, file, verify=verify)]


def checkpoints_in(directory: Path) -> list[tuple[Path, Manifest | None]]:
    """Return what looks like a checkpoint and its manifest, the newest first, those without a manifest at the end."""
    found: list[tuple[Path, Manifest | None]] = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        name = _NAME.fullmatch(path.name)
        if name is not None and not (name[1] and (directory / name[1]).exists()):
            try:
                found.append((path, Manifest.read(path)))
            except ValueError:
                found.append((path, None))
    return sorted(found, key=lambda each: -1 if each[1] is None else each[1].sequence, reverse=True)


def find_newest(directory: Path, *, verify: bool = False) -> Found:
    """Find the newest whole checkpoint, without changing anything and without communication.

    A checkpoint is whole if its manifest and all files are there with their lengths.

    Args:
        directory: where checkpoints lie; it may be missing.
        verify: whether the newest one's checksums must be right, too; those before it count by their lengths only.

    Returns:
        The newest whole checkpoint, and the damaged files of the others.

    Raises:
        ValueError: there is one of a newer format. It may be the newest, so none is taken in its place.
    """
    newest: Path | None = None
    damaged: list[Damage] = []
    for path, _ in checkpoints_in(directory):
        damages = damages_of(path, verify=verify and newest is None)
        if damages:  # or it was being replaced or removed
            damages = damages_of(path, verify=verify and newest is None)
        if not path.exists():
            continue
        damaged += damages
        if newest is None and not damages:
            newest = path
    return Found(newest, tuple(damaged))


def record_file(path: Path) -> FileRecord:
    """Bring a file to the disk and return its length and checksums."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        if not os.fstat(stream.fileno()).st_size:
            return FileRecord.of(memoryview(b""))
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            return FileRecord.of(view)


def publish(filled: Path, target: Path) -> None:
    """Give a complete directory its name, in the place of what has it already; a kill loses neither of the two."""
    sync_directory(filled)
    previous = _hidden(target, "replaced")
    if target.exists():
        if previous.exists():
            remove(previous)
        _rename(target, previous)
    _rename(filled, target)
    sync_directory(target.parent)
    if previous.exists():
        remove(previous)


def _rename(source: Path, target: Path) -> None:
    """Rename a directory. A network file system that sends a request twice says that it has failed the second time."""
    try:
        source.rename(target)
    except FileNotFoundError:
        if not target.exists():
            raise


def remove(directory: Path) -> None:
    """Delete a directory, which never looks whole in between.

    What cannot be deleted (on network file systems, what a reader has open) waits, hidden, for the next time.
    """
    hidden = directory
    if directory.suffix not in (".writing", ".removed"):
        hidden = _hidden(directory, "removed")
        shutil.rmtree(hidden, ignore_errors=True)
        if hidden.exists():
            hidden = _hidden(directory, f"{secrets.token_hex(4)}.removed")
        _rename(directory, hidden)
        sync_directory(hidden.parent)
    shutil.rmtree(hidden, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Make a directory and its parents where they are missing; they survive a power cut."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_directory(each.parent)


def writing_directory(target: Path) -> Path:
    """Return under which name a checkpoint is written."""
    return _hidden(target, "writing")


def _hidden(target: Path, state: str) -> Path:
    return target.with_name(f".{target.name.removeprefix('.')}.{state}")


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left, unless somebody is writing."""
    if not directory.is_dir():
        return
    with lock(directory) as held:
        if not held:
            return
        for path in directory.glob(".step-*"):
            name, _, state = path.name[1:].rpartition(".")
            if state in ("writing", "removed") or (state == "replaced" and (directory / name).exists()):
                remove(path)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[bool]:
    """Hold the lock for writing; gives False if somebody else does. A killed process holds it no more."""
    stream = acquire(directory)
    try:
        yield stream is not None
    finally:
        if stream is not None:
            release(stream)


def acquire(directory: Path) -> BinaryIO | None:
    """Take the lock, to be given to `release`; None if somebody else has it.

    A file system without locks lets everybody have it.
    """
    stream = (directory / LOCK_NAME).open("ab")
    if _try_lock(stream, fcntl.LOCK_EX):
        return stream
    stream.close()
    return None


def is_locked(directory: Path) -> bool:
    """Whether somebody holds the lock; several processes may ask at once."""
    try:
        stream = (directory / LOCK_NAME).open("rb")
    except FileNotFoundError:
        return False
    with stream:
        return not _try_lock(stream, fcntl.LOCK_SH)


def _try_lock(stream: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def release(stream: BinaryIO) -> None:
    """Give the lock back, also where a forked process has inherited it."""
    with stream, contextlib.suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_UN)


def prune(directory: Path, *, keep_last: int, keep_best: bool) -> None:
    """Delete old checkpoints, but neither the newest whole ones, nor the best, nor damaged ones."""
    whole = [
        (path, manifest)
        for path, manifest in checkpoints_in(directory)
        if manifest is not None and not damages_of(path, verify=False)
    ]
    kept = {path for path, _ in whole[:keep_last]}
    scored = [(manifest.score, manifest.sequence, path) for path, manifest in whole if manifest.score is not None]
    if keep_best and scored:
        kept.add(min(scored)[2])
    for path, _ in whole:
        if path not in kept:
            remove(path)
    for path in directory.glob(".step-*.removed"):
        remove(path)


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def as_json(content: Any) -> bytes:
    """Return the content of a JSON file.

    Raises:
        ValueError: JSON cannot hold it.
    """
    try:
        return (json.dumps(content, indent=2) + "\n").encode()
    except TypeError as error:
        raise ValueError(f"what training keeps must be values that JSON can hold: {error}") from error
