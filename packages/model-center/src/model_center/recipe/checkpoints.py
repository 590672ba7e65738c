"""Checkpoints of training: written whole or not at all, resumed by any number of processes under either engine.

A checkpoint is a directory:

    config.json, model*.safetensors, tokenizer files     what `from_pretrained` loads
    optimizer-00001-of-0000N.safetensors                  what each process holds of masters and moments, by the name
                                                          of the parameter: "<optimizer>/<state>/<first element>/<name>"
    random-00001-of-0000N.safetensors                     states of each process's random generators
    training.json                                         progress, schedules, loss scale, options of the optimizers
    run.yaml                                              the resolved configuration
    manifest.json                                         length and checksums of all these, versions; written last

All processes must see the same file system. Each writes its files under a temporary name and leaves a note when they
are on disk. The first one waits for all notes, writes the manifest and gives the directory its name with one rename.
Written asynchronously, this happens in a thread of each process that uses no collectives, so that the checkpoint
becomes complete while all are training; that all know of success or failure is settled by the next `save`, `wait`,
`newest` or `close`.
"""

import math
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from model_center.engine import current_engine, synchronize

from . import checkpoint_files as files
from .agreement import from_first, raise_together, together
from .checkpoint_files import Damage, Found, Manifest, find_newest
from .checkpoint_state import Layout, SavedTraining, TrainingState
from .checkpoint_writing import HURRIED_TIMEOUT, HostMemory, Writing
from .run_directory import PACKAGES

__all__ = ["CheckpointStore", "Damage", "Found", "TrainingState", "find_newest"]


class CheckpointStore:
    """The checkpoints of one run.

    All processes make one and call its methods together. Opening it removes what killed writers have left behind.
    For a look from outside a run there is `find_newest`.

    Args:
        directory: Where checkpoints lie, one directory for each step.
        keep_last: How many of the newest are kept, at least 1.
        keep_best: Whether that with the lowest score is kept as well.
        asynchronous: Whether `save` returns as soon as it has copied the state to host memory, and files are written
            while training goes on. A process then needs memory for its share of weights, masters and moments.

    Raises:
        ValueError: `keep_last` is out of range.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_best: bool, asynchronous: bool) -> None:
        if keep_last < 1:
            raise ValueError(f"`keep_last` must be at least 1, but is {keep_last}")
        self._directory, self._keep_last, self._keep_best = directory, keep_last, keep_best
        self._asynchronous = asynchronous
        self._pending: Writing | None = None
        self._host = HostMemory()
        self._verified: set[Path] = set()
        together(self._open)

    def _open(self) -> None:
        if current_engine().rank == 0:
            files.remove_leftovers(self._directory)

    def save(self, state: TrainingState, *, step: int, config: str, score: float | None = None) -> None:
        """Write a checkpoint, in the place of one of the same step, then delete those that need not be kept.

        If a process cannot write, what all have written is removed and older checkpoints stay as they are.

        Args:
            state: what to save.
            step: number of training steps done.
            config: the resolved configuration, as text.
            score: validation loss; lower is better.

        Raises:
            OSError: a process could not write, now or asynchronously since the last call; the message names the
                process and the file.
            ValueError: `state` holds what cannot be saved.
        """
        self.wait()
        synchronize()
        manifest = Manifest(
            step=step,
            sequence=0,
            score=score if score is not None and math.isfinite(score) else None,
            world_size=current_engine().world_size,
            engine=current_engine().name,
            model=type(state.model).__name__,
            versions={package: version(package) for package in PACKAGES},
            files={},
        )
        layout = together(lambda: Layout(state))
        target = self._directory / files.step_name(step)
        writing = Writing(target, manifest, keep_last=self._keep_last, keep_best=self._keep_best)
        try:
            together(lambda: writing.open(state, layout, config))
            together(writing.join)
        except (OSError, ValueError):
            _clean_up(writing)
            raise
        self._pending = writing
        if self._asynchronous:
            writing.start(layout, *self._host.copy(layout.pieces()))
        else:
            writing.write(layout, layout.pieces())
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            OSError, ValueError: as `save`.
        """
        if self._pending is None:
            return
        writing, self._pending = self._pending, None
        writing.finish()
        self._verified.discard(writing.target)
        try:
            raise_together(writing.error)
        except (OSError, ValueError):  # of which all know; otherwise there may be nobody to wait for
            _clean_up(writing)
            raise
        else:
            _clean_up(writing)
        finally:
            writing.release()

    def close(self) -> None:
        """Wait as `wait` does. Nothing needs closing after an error."""
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; after an error, which others may not share, let this process's part be written only."""
        if error is None:
            self.close()
        elif self._pending is not None:
            writing, self._pending = self._pending, None
            writing.finish(patience=HURRIED_TIMEOUT)
            writing.release()
            if writing.error is not None:
                error.add_note(f"besides, {writing.error}")

    def newest(self, *, verify: bool = False) -> Found:
        """Find the newest whole checkpoint and what is damaged of the others.

        Args:
            verify: whether its checksums must be right, too, for which all of it is read.

        Raises:
            OSError, ValueError: as `save`, of what was being written.
            ValueError: there is a checkpoint of a newer format.
        """
        self.wait()
        is_first = current_engine().rank == 0
        found = together(lambda: find_newest(self._directory, verify=verify) if is_first else Found(None))
        path, damaged = from_first(
            [found.path and str(found.path), [[str(each.path), each.file, each.reason] for each in found.damaged]]
        )
        newest = None if path is None else Path(path)
        if verify and newest is not None:
            self._verified.add(newest)
        return Found(newest, tuple(Damage(Path(place), file, reason) for place, file, reason in damaged))

    def load(self, path: Path, state: TrainingState) -> dict[str, Any]:
        """Restore a checkpoint, saved by any number of processes under either engine.

        With as many processes as saved it, training goes on bit by bit as it would have. Processes that had no
        counterpart then get random generators with seeds that are derived from those of the first one.

        Args:
            path: the checkpoint; that of the first process counts, if others have found another one.
            state: what to load into; its progress is left alone.

        Returns:
            The progress that was saved.

        Raises:
            ValueError: it is damaged, of a newer format, or of another model or optimizer; the message says how they
                differ and nothing has been changed.
            OSError: it cannot be read.
        """
        self.wait()
        path = Path(from_first(str(path)))
        manifest = together(lambda: _checked_manifest(path))
        if path not in self._verified:
            together(lambda: _verify_share(path, manifest))
        saved = together(lambda: SavedTraining(path, manifest))
        together(lambda: saved.check(state))
        return saved.restore(state)


def _clean_up(writing: Writing) -> None:
    writing.clean_up()
    synchronize()  # so that nobody sees what is being removed


def _checked_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        return Manifest.read(path)
    except files.DamagedManifestError as error:
        raise ValueError(f"the checkpoint {path} is damaged: {files.MANIFEST_NAME}: {error}") from error


def _verify_share(path: Path, manifest: Manifest) -> None:
    """Read this process's share of the files and compare checksums."""
    engine = current_engine()
    share = list(manifest.files)[engine.rank :: engine.world_size]
    damages = [damage for file in share for damage in manifest.damages(path, file, verify=True)]
    if damages:
        raise ValueError("\n".join([f"the checkpoint {path} is damaged:", *map(str, damages)]))
