"""Writing one checkpoint from several processes, in the foreground or in a thread of each."""

import atexit
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import torch

from model_center.dataset.indexed.manifest import FileRecord
from model_center.engine import atomic_write, current_engine
from model_center.model.safetensors_writer import SafetensorsWriter
from model_center.model.source import CONFIG_NAME, read_json

from . import checkpoint_files as files
from .checkpoint_files import Manifest
from .checkpoint_state import TRAINING_NAME, Layout, Piece, TrainingState

PARTNER_TIMEOUT = 1800.0
"""Seconds that the first process waits for the files of the others after it has written its own."""
HURRIED_TIMEOUT = 60.0
"""Likewise when the run has failed, perhaps because another process is no more."""
_SEEN_BY_ALL = 60.0
"""Seconds after which a directory that one process has made must be seen by the others."""
_LOOK_AGAIN = 0.02
_WEIGHT_INDEX = "model.safetensors.index.json"


class Writing:
    """A checkpoint on its way to the disk: the part of one process.

    The order of calls, on every process: `open` and `join`, each followed by an agreement that all have succeeded;
    `write` or `start`; `finish`; an agreement about `error`; `clean_up`, or `release` where there is no agreement.

    Args:
        target: The checkpoint.
        manifest: What is known of it; the files are still to be added.
        keep_last: How many of the newest checkpoints stay afterwards.
        keep_best: Whether the best one stays as well.

    Attributes:
        error: What went wrong in this process's part.
    """

    def __init__(self, target: Path, manifest: Manifest, *, keep_last: int, keep_best: bool) -> None:
        self.target = target
        self.error: Exception | None = None
        self._manifest, self._keep_last, self._keep_best = manifest, keep_last, keep_best
        # A thread must not ask for the engine, of which there may be another by then.
        self._rank, self._world_size = current_engine().rank, current_engine().world_size
        self._directory = files.writing_directory(target)
        self._records: dict[str, FileRecord] = {}
        self._lock: BinaryIO | None = None
        self._thread: Thread | None = None
        self._deadline = math.inf

    @property
    def is_first(self) -> bool:
        """Whether this is the first process."""
        return self._rank == 0

    def open(self, state: TrainingState, layout: Layout, config: str) -> None:
        """Make the directory and write everything but tensors, on the first process."""
        if not self.is_first:
            return
        parent = self.target.parent
        files.make_directory(parent)
        self._lock = files.acquire(parent)
        if self._lock is None:
            raise OSError(f"another process is writing a checkpoint to {parent}; let every run have its own directory")
        if self._directory.exists():
            files.remove(self._directory)
        with self._naming("its directory"):
            self._directory.mkdir()
        contents = {
            CONFIG_NAME: files.as_json(state.model.config.to_dict()),
            TRAINING_NAME: files.as_json(state.to_json()),
            "run.yaml": config.encode(),
        }
        if layout.index is not None:
            contents[_WEIGHT_INDEX] = files.as_json(layout.index)
        for name, content in contents.items():
            with self._naming(name):
                (self._directory / name).write_bytes(content)
        if state.tokenizer is not None:
            with self._naming("the files of the tokenizer"):
                state.tokenizer.save_pretrained(self._directory)
        for path in sorted(self._directory.iterdir()):
            self._record(path.name)

    def join(self) -> None:
        """Leave a note that this process is going to write."""
        deadline = time.monotonic() + _SEEN_BY_ALL
        while not self._directory.is_dir():
            if time.monotonic() > deadline:
                raise OSError(f"{self._directory} must be on a file system that all processes see, but is not here")
            time.sleep(_LOOK_AGAIN)
            if self.target.parent.is_dir():
                any(self.target.parent.iterdir())  # lets a network file system ask its server again
        with self._naming("its note"):
            self._note(self._rank, "writing").touch()

    def start(self, layout: Layout, pieces: Iterable[Piece], ready: torch.cuda.Event | None) -> None:
        """Write in a thread.

        Args:
            layout: what goes where.
            pieces: copies that training does not change.
            ready: when they hold what they should.
        """

        def work() -> None:
            if ready is not None:
                ready.synchronize()
            self.write(layout, pieces)

        self._thread = Thread(target=work, name=f"writing {self.target.name}", daemon=True)
        atexit.register(self._finish_at_exit)
        self._thread.start()

    def write(self, layout: Layout, pieces: Iterable[Piece]) -> None:
        """Write this process's files; on the first process, then complete the checkpoint. Errors go to `error`."""
        try:
            self._write_pieces(layout, pieces)
            with self._naming("its note"), atomic_write(self._note(self._rank, "done")) as file:
                file.write(files.as_json({name: asdict(record) for name, record in self._records.items()}))
            if self.is_first and self._others_are_done():
                self._complete()
        except Exception as error:  # noqa: BLE001 - the caller raises it, on all processes
            self.error = error
            with suppress(OSError):  # deleting needs no room on the disk
                self._note(self._rank, "writing").unlink(missing_ok=True)

    def finish(self, *, patience: float = PARTNER_TIMEOUT) -> None:
        """Wait until this process's part is over.

        Args:
            patience: seconds from now that the first process waits for the others.
        """
        if self._thread is not None:
            self._deadline = time.monotonic() + patience
            self._thread.join()
            self._thread = None
            atexit.unregister(self._finish_at_exit)

    def _finish_at_exit(self) -> None:
        """Let the last checkpoint of a program that has not asked for its end become complete, or tell why not."""
        self.finish(patience=HURRIED_TIMEOUT)
        self.release()
        if self.error is not None:
            sys.stderr.write(f"{self.error}\n")

    def clean_up(self) -> None:
        """Remove what is not complete, once all processes are over with it, and let others write."""
        if self._lock is not None:
            with suppress(OSError):  # what stays is removed when a run opens the directory
                files.remove(self._directory)
        self.release()

    def release(self) -> None:
        """Let others write. What is not complete is removed when a run opens the directory."""
        if self._lock is not None:
            files.release(self._lock)
            self._lock = None

    def _write_pieces(self, layout: Layout, pieces: Iterable[Piece]) -> None:
        """Write tensors one after another; after an error go on to the end, as others may be waiting in a gathering."""
        remaining = iter(pieces)
        error: Exception | None = None
        piece = next(remaining, None)
        while piece is not None:
            file = piece.file
            try:
                with (
                    self._naming(file),
                    SafetensorsWriter(self._directory / file, layout.names(file)) as writer,
                ):
                    while piece is not None and piece.file == file:
                        writer.add(piece.name, piece.read())
                        piece = next(remaining, None)
                self._record(file)
            except (OSError, ValueError) as caught:
                error = error or caught
                piece = next((later for later in remaining if later.file != file), None)
        if error is not None:
            raise error

    def _record(self, name: str) -> None:
        with self._naming(name):
            self._records[name] = files.record_file(self._directory / name)

    def _others_are_done(self) -> bool:
        """Wait for the others' files; returns False once one has failed, which will tell why by itself."""
        began = time.monotonic()
        for rank in range(1, self._world_size):
            while not self._note(rank, "done").exists():
                if not self._note(rank, "writing").exists():
                    return False
                now = time.monotonic()
                if now > min(self._deadline, began + PARTNER_TIMEOUT):
                    raise OSError(f"process {rank} has not written its files {now - began:.0f} s after the first one")
                time.sleep(_LOOK_AGAIN)
        return True

    def _complete(self) -> None:
        records: dict[str, Any] = {}
        for rank in range(self._world_size):
            records |= read_json(self._note(rank, "done"))
            for state in ("done", "writing"):
                self._note(rank, state).unlink()
        earlier = [manifest.sequence for _, manifest in files.checkpoints_in(self.target.parent) if manifest]
        manifest = replace(
            self._manifest,
            sequence=1 + max(earlier, default=0),
            files={name: FileRecord(**record) for name, record in sorted(records.items())},
        )
        with self._naming(files.MANIFEST_NAME), atomic_write(self._directory / files.MANIFEST_NAME) as file:
            file.write(manifest.to_json())
        with self._naming("its directory"):
            files.publish(self._directory, self.target)
        files.prune(self.target.parent, keep_last=self._keep_last, keep_best=self._keep_best)

    def _note(self, rank: int, state: str) -> Path:
        return self._directory / f".process-{rank + 1:05d}.{state}"

    @contextmanager
    def _naming(self, file: str) -> Iterator[None]:
        """Let errors tell which file of which checkpoint was being written. Not all libraries raise OSError."""
        try:
            yield
        except ValueError:
            raise
        except Exception as error:  # other processes must learn of it, whatever it is
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            raise OSError(f"cannot write {file} of checkpoint {self.target}: {reason}") from error


class HostMemory:
    """Room for copies of what is written while training goes on, kept for the next time; pinned for those of GPUs."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], torch.Tensor] = {}

    def copy(self, pieces: Iterable[Piece]) -> tuple[list[Piece], torch.cuda.Event | None]:
        """Copy pieces, and return the copies and when they can be read; the caller need not wait for that."""
        copied = [replace(piece, read=self._copy(piece).detach) for piece in pieces]
        device = current_engine().device
        return copied, torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def _copy(self, piece: Piece) -> torch.Tensor:
        key, tensor = (piece.file, piece.name), piece.read()
        room = self._copies.get(key)
        if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
            room = self._copies[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return room.copy_(tensor, non_blocking=True)
