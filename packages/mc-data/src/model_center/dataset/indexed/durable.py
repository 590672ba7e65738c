"""Several files that appear together, or not at all, whatever moment the process is killed at.

A data set is three files, and a file system renames one at a time. So new files are written under temporary names,
and then committed by one atomic step: a journal, `.<name>.commit`, that lists the renames still to be done. From then
on the new data set is the valid one, and whoever comes next (a reader, a writer, `mc-preprocess repair`) completes the
renames first. The `.idx` file goes away first and comes back last, so that programs that know nothing of the journal
see the old data set, the new one, or none, but never a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from .format import IndexedDatasetError, file_of

SUFFIXES = (".bin", ".manifest.json", ".idx")
_TOKEN_LENGTH = 16


class Staging:
    """The temporary files of one writer, up to the moment they replace the data set `prefix`.

    Every file is locked while it is open, by which `remove_stale` knows that its writer is alive.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._process = os.getpid()
        self._files: dict[str, tuple[Path, BinaryIO]] = {}

    def open(self, suffix: str) -> BinaryIO:
        """Create an unbuffered file that is to become `prefix` + `suffix`."""
        while True:
            path = self._temporary(suffix)
            stream = path.open("xb", buffering=0)
            fcntl.flock(stream, fcntl.LOCK_EX)
            if os.fstat(stream.fileno()).st_nlink:  # else another process took it for stale just before the lock
                self._files[suffix] = path, stream
                return stream
            stream.close()

    def keep(self, suffix: str) -> None:
        """Let the data set go on having the file `prefix` + `suffix` that it has now."""
        path = self._temporary(suffix)
        os.link(file_of(self.prefix, suffix), path)
        self._files[suffix] = path, path.open("rb", buffering=0)

    def _temporary(self, suffix: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}.{secrets.token_hex(_TOKEN_LENGTH // 2)}{suffix}.tmp")

    def sync(self) -> None:
        """Bring the content of all files to the disk."""
        for _, stream in self._files.values():
            os.fsync(stream.fileno())

    def replace(self) -> None:
        """Let the single file `prefix` have the content of the single file staged with suffix `""`."""
        path, _ = self._files[""]
        path.replace(self.prefix)
        self.discard()

    def commit(self, *, sync: bool = True) -> None:
        """Let the data set consist of exactly the staged files; a known suffix that was not staged is removed.

        Args:
            sync: Whether to wait until the disk has the content before the data set changes.
        """
        renames = {suffix: path.name for suffix, (path, _) in self._files.items()}
        stream = self.open(".commit")
        write_all(stream, json.dumps(renames).encode())
        if sync:
            self.sync()
            sync_directory(self.prefix.parent)
        while True:
            complete_publication(self.prefix)
            try:
                os.link(self._files[".commit"][0], journal_of(self.prefix))
                break
            except FileExistsError:  # another writer's journal came first, which a rename would have destroyed
                continue
        files, self._files = self._files, {}  # from here on they are the data set's: nothing may discard them
        sync_directory(self.prefix.parent)
        for _, stream in files.values():
            stream.close()  # the journal's lock is needed to carry it out
        files[".commit"][0].unlink(missing_ok=True)
        complete_publication(self.prefix)

    def discard(self) -> None:
        """Remove what is still temporary (not in a forked child, whose parent may go on writing)."""
        if os.getpid() != self._process:
            return
        for path, stream in self._files.values():
            path.unlink(missing_ok=True)
            stream.close()
        self._files.clear()


def write_all(stream: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte to an unbuffered stream, which may take fewer at a time."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace one file by `data`, durably: readers see the old content or the new."""
    staging = Staging(path)
    try:
        write_all(staging.open(""), data)
        staging.sync()
        staging.replace()
    finally:
        staging.discard()
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def journal_of(prefix: Path) -> Path:
    """Return the journal's path."""
    return prefix.with_name(f".{prefix.name}.commit")


def complete_publication(prefix: Path) -> bool:
    """Carry out the renames of a journal that its writer left behind, if there is one.

    Returns:
        Whether there was one.

    Raises:
        IndexedDatasetError: The renames are not permitted here, or the journal is not one.
    """
    journal = journal_of(prefix)
    if not journal.exists():
        return False
    try:
        with _locked(journal) as text:
            if text is not None:  # else another process completed it while this one waited
                _roll_forward(prefix, _renames(journal, text))
                sync_directory(prefix.parent)
                journal.unlink()
                sync_directory(prefix.parent)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise IndexedDatasetError(
                f"{prefix}: its last writer was killed while it renamed the files, and this process may not complete "
                f"that ({error.strerror}); open the data set once where its folder is writable"
            ) from error
        raise
    return True


@contextlib.contextmanager
def _locked(journal: Path) -> Iterator[str | None]:
    """Give the journal's text under an exclusive lock, or None when it is gone once the lock is granted."""
    try:
        stream = journal.open("r+", encoding="utf-8", errors="replace")
    except FileNotFoundError:
        yield None
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.read() if is_same_file(stream.fileno(), journal) else None


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _renames(journal: Path, text: str) -> Mapping[str, str]:
    """Read a journal, which may name nothing but temporary files of its own data set."""
    start = journal.name.removesuffix("commit")
    renames: dict[str, str] = {}
    try:
        renames = json.loads(text)
        sound = ".idx" in renames and all(
            suffix in SUFFIXES and name.startswith(start) and name.endswith(f"{suffix}.tmp") and "/" not in name
            for suffix, name in renames.items()
        )
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise IndexedDatasetError(f"{journal}: not a journal of this data set; remove it and rebuild the data set")
    return renames


def _roll_forward(prefix: Path, renames: Mapping[str, str]) -> None:
    """Move every listed file that is still under its temporary name; the index goes first and comes last."""
    if prefix.with_name(renames[".idx"]).exists():
        file_of(prefix, ".idx").unlink(missing_ok=True)
    for suffix in SUFFIXES:
        target = file_of(prefix, suffix)
        if suffix not in renames:
            target.unlink(missing_ok=True)
        elif (temporary := prefix.with_name(renames[suffix])).exists():
            temporary.replace(target)
            temporary.unlink(missing_ok=True)  # a rename between two links to one file leaves both


def remove_stale(prefix: Path) -> list[Path]:
    """Remove the temporary files that killed writers of this data set left behind.

    Returns:
        The files removed.
    """
    complete_publication(prefix)
    endings = {f"{suffix}.tmp" for suffix in ("", ".commit", *SUFFIXES)}
    removed = []
    for path in prefix.parent.glob(f".{glob.escape(prefix.name)}.*.tmp"):
        token, dot, rest = path.name[len(prefix.name) + 2 :].partition(".")
        if len(token) != _TOKEN_LENGTH or dot + rest not in endings:  # a file of "a.b", when cleaning up for "a"
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its writer may have committed it and let go of the lock just now; then it is part of the new data set.
            if not journal_of(prefix).exists():
                path.unlink()
                removed.append(path)
    return removed
