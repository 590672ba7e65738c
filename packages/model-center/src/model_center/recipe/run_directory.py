"""The directory a run writes: what lies where, its status, and how parts of it are replaced without a gap.

    config.yaml        the resolved configuration, to be fed back
    status.json        running, interrupted, failed or finished; "finished" is the last thing a run writes
    metrics.jsonl      one JSON object a line for every training step and every evaluation
    tensorboard/       the same as TensorBoard events
    plot.png           loss and score over the steps
    checkpoints/       fine-tuning: best and last, each model, what it answers with, and tokenizer;
                       pre-training: step-00001000, …, all that a run needs to go on (see `checkpoints`)
    anomalies/         pre-training: a JSON file for each step that the watch over the loss found fault with
    wandb/             records of Weights & Biases, if they are asked for
    .lock              locked while a run writes here, so that no other one does

A killed process leaves "running" behind, so a directory counts as a whole run only when its status says finished.
What else lies there is not the run's, and is never deleted.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from model_center.engine import atomic_write

from .checkpoint_files import LOCK_NAME, is_locked, lock, publish, writing_directory
from .valid_json import valid_json

FORMAT_VERSION = 1
State = Literal["running", "interrupted", "failed", "finished"]
PACKAGES = ("model-center", "mc-layers", "mc-models", "mc-tokenizers", "mc-data", "torch", "transformers")


class Entry(StrEnum):
    """Names of all that a run writes into its directory beside the lock, and so of all that an overwrite deletes."""

    CONFIG = "config.yaml"
    STATUS = "status.json"
    METRICS = "metrics.jsonl"
    TENSORBOARD = "tensorboard"
    PLOT = "plot.png"
    CHECKPOINTS = "checkpoints"
    ANOMALIES = "anomalies"
    WANDB = "wandb"


@dataclass
class RunDirectory:
    """Paths inside a run directory, and its status."""

    path: Path
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / Entry.CONFIG

    @property
    def metrics(self) -> Path:
        """JSON lines of training steps and evaluations."""
        return self.path / Entry.METRICS

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / Entry.TENSORBOARD

    @property
    def plot(self) -> Path:
        """Loss and score as a picture."""
        return self.path / Entry.PLOT

    def checkpoint(self, name: Literal["best", "last"]) -> Path:
        """Directory of the checkpoint with the best score, or of the last one."""
        return self.path / Entry.CHECKPOINTS / name

    @contextmanager
    def new_last_checkpoint(self) -> Iterator[Path]:
        """Fill a directory that takes the last checkpoint's place when it is complete."""
        with replacing(self.checkpoint("last")) as directory:
            yield directory

    def keep_last_as_best(self) -> None:
        """Let a copy of the last checkpoint take the best one's place."""
        with replacing(self.checkpoint("best")) as directory:
            copy_files(self.checkpoint("last"), directory)

    def set_state(self, state: State, **details: Any) -> None:
        """Record the run's state, and whatever else is known about it, in status.json; what is no number is null."""
        self.status |= {"state": state, "updated": _now()} | details
        write_text(status_file(self.path), valid_json(self.status, indent=2) + "\n")


class UnwrittenRun(RunDirectory):
    """A run directory as all processes but the first have it: the same paths, and nothing is written."""

    @contextmanager
    def new_last_checkpoint(self) -> Iterator[Path]:
        """Give the directory that the first process fills."""
        yield self.checkpoint("last")

    def keep_last_as_best(self) -> None:
        """Leave it to the first process."""

    def set_state(self, state: State, **details: Any) -> None:
        """Leave it to the first process."""


def status_file(path: Path) -> Path:
    """Return where a run directory keeps its status."""
    return path / Entry.STATUS


def entries_of_run(path: Path) -> Iterator[Path]:
    """Yield what a run has left in a directory, and what killed processes had not finished there; not the lock."""
    for name in Entry:
        if os.path.lexists(path / name):
            yield path / name
        yield from sorted(path.glob(f".{name}.*.tmp"))  # of `atomic_write`


def read_status(path: Path) -> dict[str, Any]:
    """Return a run's status; `status["state"]` is "finished" only for a run that came to its end.

    Raises:
        ValueError: `path` is not a run directory, or one of a newer format.
    """
    file = status_file(path)
    try:
        status: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a run directory: {file.name} cannot be read ({error})") from error
    if not isinstance(status, dict) or not isinstance(found := status.get("format_version"), int):
        raise ValueError(f"{path} is not a run directory: {file.name} has no format_version")
    if found > FORMAT_VERSION:
        raise ValueError(f"{file} has format version {found}; this version reads up to {FORMAT_VERSION}")
    return status


def check_output(path: Path, *, overwrite: bool, resumable: bool = False) -> None:
    """Refuse an output directory that holds something or cannot be written, without changing anything.

    Args:
        path: the directory.
        overwrite: whether an earlier run in it may be deleted.
        resumable: whether runs of this kind can be resumed, which the message then says.

    Raises:
        ValueError: `path` is no directory, cannot be created or written, another run is writing there, or it is not
            empty and either `overwrite` is off or it is not a run's directory.
    """
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"output directory {str(path)!r} cannot be made: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output directory {str(path)!r} cannot be written: no permission to write {str(existing)!r}")
    if existing != path or all(entry.name == LOCK_NAME for entry in path.iterdir()):
        return
    _check_unlocked(path)
    if not overwrite:
        or_resume = ", --resume auto to go on with the run there" * (resumable and status_file(path).is_file())
        raise ValueError(
            f"output directory {str(path)!r} is not empty; give another one{or_resume}, or --overwrite to replace it"
        )
    if not status_file(path).is_file():
        raise ValueError(
            f"output directory {str(path)!r} is not empty and no run directory (it has no status.json), "
            "so --overwrite does not delete it; give another one"
        )


def check_resumable(path: Path) -> None:
    """Refuse a directory that holds no run, or one of a newer format, or one that is still going on.

    Raises:
        ValueError: it does.
    """
    read_status(path)
    _check_unlocked(path)


def _check_unlocked(path: Path) -> None:
    if is_locked(path):
        raise _in_use(path)


def _in_use(path: Path) -> ValueError:
    return ValueError(
        f"another run is writing to {str(path)!r}; stop it first, or give this one another output directory"
    )


@contextmanager
def open_run(
    path: Path, config: str, *, overwrite: bool = False, is_writer: bool = True, resume: bool = False
) -> Iterator[RunDirectory]:
    """Create a run directory, and record on leaving whether the run was finished, interrupted or failed.

    Args:
        path: the directory; an earlier run in it is deleted if `overwrite`, and nothing else.
        config: text of the resolved configuration.
        overwrite: replace an earlier run.
        is_writer: whether this process writes; of several, one does.
        resume: go on with the run that is there; its files stay.

    Yields:
        The directory, in state "running".

    Raises:
        ValueError: as `check_output` and `check_resumable`.
    """
    if not is_writer:
        yield UnwrittenRun(path)
        return
    if resume:
        check_resumable(path)
    else:
        check_output(path, overwrite=overwrite)
    path.mkdir(parents=True, exist_ok=True)
    with lock(path) as held:
        if not held:
            raise _in_use(path)
        yield from _recorded_run(path, config, resume=resume)


def _recorded_run(path: Path, config: str, *, resume: bool) -> Iterator[RunDirectory]:
    run = RunDirectory(path)
    versions = {package: version(package) for package in PACKAGES}
    # The status comes first: an old "finished" must not stay beside half-deleted files.
    run.set_state("running", format_version=FORMAT_VERSION, pid=os.getpid(), started=_now(), versions=versions)
    for entry in () if resume else entries_of_run(path):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != status_file(path):
            entry.unlink()
    write_text(run.config, config)
    try:
        yield run
    except BaseException as error:
        # On a disk that is full the status may stay "running"; what ended the run is told all the same.
        with suppress(OSError):
            if isinstance(error, KeyboardInterrupt):
                run.set_state("interrupted")
            else:
                run.set_state("failed", error=f"{type(error).__name__}: {error}")
        raise
    run.set_state("finished")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that readers, and survivors of a crash, see the old or the new text, never a part."""
    with atomic_write(path) as file:
        file.write(text.encode())


def copy_files(source: Path, target: Path) -> None:
    """Copy all that one directory holds into another, which is empty.

    Raises:
        OSError: that of the first file that cannot be copied. `shutil.copytree` would go on with the others, and raise
            an error that no longer tells a full disk.
    """
    for entry in sorted(source.rglob("*")):
        copied = target / entry.relative_to(source)
        if entry.is_dir():
            copied.mkdir()
        else:
            shutil.copy2(entry, copied)


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Fill a directory beside `directory`, then put it in its place; on an error the previous one stays untouched.

    Yields:
        The empty directory to fill.
    """
    new = writing_directory(directory)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    publish(new, directory)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
