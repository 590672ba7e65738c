"""From text files to indexed data sets: in parallel, resumable, and the same bytes whatever the number of processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from model_center.dataset.indexed import (
    IndexedDatasetError,
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
    best_fitting_dtype,
)
from model_center.dataset.indexed.durable import SUFFIXES, is_same_file, write_atomically
from model_center.dataset.indexed.format import file_of

from .encoders import Encoder
from .executors import Executor, LocalExecutor
from .reading import Batch, InputError, Part, ReadOptions, line_number, plan_parts, read_part

Layout = Literal["numbered", "single"]

# The files of a folder `<output>.parts`, beside its lock, with the temporary ones that precede them.
_PART = re.compile(r"part_\d+\.(bin|idx|manifest\.json)|\.part_\d+\.(commit|\w+\..*tmp)")
_PLAN = re.compile(r"plan\.json|\.plan\.json\.\w+\.tmp")


@dataclass(frozen=True)
class Counts:
    """What was read and written.

    Attributes:
        bytes: Bytes of the inputs, as they are on the disk.
        lines: Lines or rows, blank ones included.
        documents: Documents written.
        sequences: Sequences written.
        tokens: Tokens written.
        dropped: Lines that were not blank, but of which the encoder left nothing.
        replaced: Invalid UTF-8 sequences that were replaced.
    """

    bytes: int = 0
    lines: int = 0
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    dropped: int = 0
    replaced: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


class Watcher(Protocol):
    """Sees how far a run is."""

    def started(self, total_bytes: int, done: Counts) -> None:
        """The run has so many bytes of input, and an earlier run has done that much."""

    def advanced(self, counts: Counts) -> None:
        """One more part is done."""


@dataclass(frozen=True)
class Task:
    """One part, and the data set it becomes."""

    part: Part
    prefix: Path
    dtype: str
    run: str


class PartEncoder:
    """Encodes parts in a worker process."""

    def __init__(self, encoder: Encoder, options: ReadOptions) -> None:
        self._encoder = encoder
        self._options = options
        if initializer := getattr(encoder, "initializer", None):
            initializer()
        self._encode_batch: Callable[[Sequence[str]], Sequence[Sequence[Sequence[int]]]] | None
        self._encode_batch = getattr(encoder, "encode_batch", None)

    def __call__(self, task: Task) -> tuple[Task, Counts]:
        """Write the data set of one part."""
        total = Counter[str]()
        with MMapIndexedDatasetBuilder(task.prefix, task.dtype) as builder:
            for batch in read_part(task.part, self._options):
                texts = [text for text in batch.texts if text is not None]
                documents = [document for document in self._encode(task.part, batch, texts) if document]
                pieces = list(itertools.chain.from_iterable(documents))
                start, tokens = len(builder), sum(map(len, pieces))
                flat = np.fromiter(itertools.chain.from_iterable(pieces), np.int64, tokens)
                try:
                    builder.add_flat(flat, list(map(len, pieces)))
                except ValueError as error:
                    where = line_number(task.part, batch.first)
                    raise InputError(f"{where} or up to {len(batch.texts)} lines later: {error}") from error
                builder.add_boundaries(start + np.cumsum([len(document) for document in documents], dtype=np.int64))
                total.update(
                    lines=len(batch.texts),
                    documents=len(documents),
                    sequences=len(pieces),
                    tokens=tokens,
                    dropped=len(texts) - len(documents),
                    replaced=batch.replaced,
                )
            counts = Counts(bytes=task.part.bytes, **total)
            builder.provenance = {"run": task.run, "part": task.part.to_json(), "counts": asdict(counts)}
        return task, counts

    def _encode(self, part: Part, batch: Batch, texts: list[str]) -> Sequence[Sequence[Sequence[int]]]:
        """Encode the lines of a batch, one by one when the encoder fails, to name the line that it fails at."""
        if self._encode_batch is not None:
            with contextlib.suppress(Exception):
                return self._encode_batch(texts)
        documents = []
        for number, text in enumerate(batch.texts, start=batch.first):
            if text is not None:
                try:
                    documents.append(self._encoder.encode(text))
                except Exception as error:
                    raise InputError(
                        f"{line_number(part, number)}: the encoder failed with {type(error).__name__}: {error}"
                    ) from error
        return documents


def tokenize_files(
    inputs: Sequence[str | Path],
    output: str | Path,
    encoder: Encoder,
    *,
    options: ReadOptions | None = None,
    layout: Layout = "numbered",
    dtype: npt.DTypeLike | None = None,
    executor: Executor | None = None,
    overwrite: bool = False,
    reuse: bool = False,
    watcher: Watcher | None = None,
) -> Counts:
    """Encode every line of text files into indexed data sets.

    The files are divided into parts, which workers encode independently into a folder `<output>.parts`, and which then
    become the data sets. A run that is killed, or stopped by an error, goes on after its last complete part when it is
    started again with the same arguments. The `.bin` and `.idx` files are the same for any number of workers.

    Args:
        inputs: Text, JSON lines or Parquet files, also compressed (`.gz`, `.zst`); `-` is standard input.
        output: With layout `numbered`, input 1, 2, … becomes the data set `<output>_1`, `<output>_2`, …, as
            `DistributedMMapIndexedDataset` reads them; with `single` all of them become the data set `<output>`.
        encoder: Turns lines into sequences.
        options: How the inputs are read.
        layout: One data set per input, or one for all.
        dtype: Type of the tokens; None chooses one by the encoder's `vocab_size`.
        executor: Where the parts are worked on; None is the calling process.
        overwrite: Whether data sets that exist are replaced (when their replacement is complete, not before), and
            whether an unfinished run with other arguments is given up.
        reuse: Whether data sets that the same inputs, options and tokenizer gave before are left as they are, rather
            than being in the way.
        watcher: Told of every part that is done.

    Returns:
        What was read and written, parts done by an earlier run included.

    Raises:
        ValueError: The output exists, its folder for parts holds something else, an unfinished run had other
            arguments, another process is at work on it, or an input or a line is at fault.
    """
    if not inputs:
        raise ValueError("`inputs` must name at least one file")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _spooled(inputs, output.parent) as paths:
        names = [str(name) for name in inputs]
        job = Job(names, paths, output, encoder, options or ReadOptions(), layout, dtype)
        return job.run(executor or LocalExecutor(1), overwrite=overwrite, reuse=reuse, watcher=watcher)


@contextlib.contextmanager
def _spooled(inputs: Sequence[str | Path], folder: Path) -> Iterator[list[Path]]:
    """Give the inputs as files: standard input is copied into one, so that it can be read in parts."""
    if all(str(name) != "-" for name in inputs):
        yield [Path(name) for name in inputs]
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".stdin.") as spool:
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.flush()
        yield [Path(spool.name) if str(name) == "-" else Path(name) for name in inputs]


class Job:
    """One planned run of `tokenize_files`: which parts there are, and which data sets they become."""

    def __init__(
        self,
        names: Sequence[str],
        paths: Sequence[Path],
        output: Path,
        encoder: Encoder,
        options: ReadOptions,
        layout: Layout,
        dtype: npt.DTypeLike | None,
    ) -> None:
        self.encoder = encoder
        self.options = options
        self.folder = output.with_name(f"{output.name}.parts")
        chosen = best_fitting_dtype(getattr(encoder, "vocab_size", None)) if dtype is None else dtype
        self.provenance: dict[str, Any] = dict(getattr(encoder, "provenance", None) or _named(encoder))
        parts = [plan_parts(path, options) for path in paths]
        plan = {
            "parts": [[part.to_json() for part in group] for group in parts],
            "modified": [path.stat().st_mtime_ns for path in paths],
            "options": asdict(options),
            "layout": layout,
            "dtype": np.dtype(chosen).name,
            **self.provenance,
        }
        self.plan = json.dumps(plan, indent=1).encode()
        self.name = hashlib.sha256(self.plan).hexdigest()
        self._resumes = False
        self._sources = dict(zip(map(str, paths), names, strict=True))
        groups = parts if layout == "numbered" else [list(itertools.chain.from_iterable(parts))]
        numbers = itertools.count(1)
        self.outputs: dict[Path, list[Task]] = {
            output.with_name(f"{output.name}_{i}") if layout == "numbered" else output: [
                Task(part, self.folder / f"part_{next(numbers)}", np.dtype(chosen).name, self.name) for part in group
            ]
            for i, group in enumerate(groups, start=1)
        }

    def run(self, executor: Executor, *, overwrite: bool, reuse: bool, watcher: Watcher | None) -> Counts:
        """Do what is not done yet."""
        _refuse_foreign(self.folder)
        with _locked(self.folder):
            self._refuse_or_clear(overwrite, reuse)
            write_atomically(self.folder / "plan.json", self.plan)
            counts = self._work(executor, watcher)
            _clear(self.folder)
        return counts

    def _refuse_or_clear(self, overwrite: bool, reuse: bool) -> None:
        """Check what an earlier run left."""
        plan = self.folder / "plan.json"
        is_unfinished = plan.exists() and plan.read_bytes() == self.plan
        self._resumes = is_unfinished or reuse
        if not is_unfinished:
            if plan.exists() and not overwrite:
                raise ValueError(
                    f"{self.folder}: an unfinished run had other inputs, options, or another tokenizer; start that one "
                    "again to complete it, or give it up with `overwrite`"
                )
            _clear(self.folder)
        ours = self.name if self._resumes else None
        existing = [str(prefix) for prefix in self.outputs if _run_of(prefix) not in {None, ours}]
        if existing and not overwrite:
            more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
            raise ValueError(f"`output`: the data set {existing[0]}{more} exists; `overwrite` replaces it")

    def _work(self, executor: Executor, watcher: Watcher | None) -> Counts:
        finished = [prefix for prefix in self.outputs if self._resumes and _run_of(prefix) == self.name]
        done = sum((_counts(MMapIndexedDataset(prefix)) for prefix in finished), Counts())
        waiting: dict[Path, int] = {}
        left: list[Task] = []
        for prefix, tasks in self.outputs.items():
            if prefix not in finished:
                missing = [task for task in tasks if _run_of(task.prefix) != self.name]
                complete = [task for task in tasks if task not in missing]
                done += sum((_counts(MMapIndexedDataset(task.prefix)) for task in complete), Counts())
                waiting[prefix] = len(missing)
                left += missing
        if watcher is not None:
            watcher.started(sum(task.part.bytes for tasks in self.outputs.values() for task in tasks), done)
        for prefix in [prefix for prefix, missing in waiting.items() if not missing]:
            self._join(prefix)
        owner = {task.prefix: prefix for prefix, tasks in self.outputs.items() for task in tasks}
        with contextlib.closing(executor.run(partial(PartEncoder, self.encoder, self.options), left)) as results:
            for task, counts in results:
                done += counts
                if watcher is not None:
                    watcher.advanced(counts)
                prefix = owner[task.prefix]
                waiting[prefix] -= 1
                if not waiting[prefix]:
                    self._join(prefix)
        assert not any(waiting.values()), "the executor returned fewer results than it got tasks"
        return done

    def _join(self, prefix: Path) -> None:
        """Make a data set of its parts, and remove them."""
        tasks = self.outputs[prefix]
        counts = sum((_counts(MMapIndexedDataset(task.prefix)) for task in tasks), Counts())
        sources = list(dict.fromkeys(self._sources[task.part.path] for task in tasks))
        provenance = {
            **self.provenance,
            "run": self.name,
            "sources": sources,
            "counts": asdict(counts),
            "command": sys.argv,
        }
        with MMapIndexedDatasetBuilder(prefix, tasks[0].dtype, provenance=provenance) as builder:
            for task in tasks:
                builder.merge_file_(task.prefix)
        for task in tasks:
            for suffix in SUFFIXES:
                file_of(task.prefix, suffix).unlink(missing_ok=True)


def _refuse_foreign(folder: Path) -> None:
    """Check that a folder for parts, if it exists, was made for that, before anything in it is touched."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output`: {folder} is a file, but is needed as a folder; move it, or choose another output")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if "plan.json" not in names:
        # A run that was killed before it had a plan leaves nothing but these.
        others = sorted(name for name in names if name != "lock" and not _PLAN.fullmatch(name))
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise ValueError(
                f"`output`: {folder} holds {others[0]}{more} and is no folder of an unfinished run (it has no "
                "plan.json), but is needed for one; move it, or choose another output"
            )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; the folder is made for it, and goes with it unless a plan to go on with remains."""
    with _lock(folder):
        try:
            yield
        finally:
            if not (folder / "plan.json").exists():
                (folder / "lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # something that is not ours was put there, and stays
                    folder.rmdir()


def _lock(folder: Path) -> IO[str]:
    """Take a folder's lock, which lasts until the file returned is closed."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = (folder / "lock").open("a")
        except FileNotFoundError:  # the run before has just ended, and removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"{folder}: another process is working on this output now") from None
        if is_same_file(lock.fileno(), folder / "lock"):
            return lock
        lock.close()  # a lock that the run before has just removed keeps nobody out


def _clear(folder: Path) -> None:
    """Remove what a run made; the plan goes last, so that what is left, if this is interrupted, is known for ours."""
    for path in [path for path in folder.iterdir() if _PART.fullmatch(path.name)]:
        path.unlink(missing_ok=True)
    for path in [path for path in folder.iterdir() if _PLAN.fullmatch(path.name)]:
        path.unlink()


def _named(encoder: Encoder) -> Mapping[str, Any]:
    """What is known of an encoder that tells nothing of itself."""
    return {"encoder": {"name": f"{type(encoder).__module__}.{type(encoder).__qualname__}"}}


def _run_of(prefix: Path) -> str | None:
    """Return which run wrote a data set; `"other"` when none of ours did, None when there is no data set."""
    if not MMapIndexedDataset.exists(prefix):
        return None
    try:
        manifest = MMapIndexedDataset(prefix).manifest
    except IndexedDatasetError:
        return "other"
    return "other" if manifest is None else str(manifest.provenance.get("run", "other"))


def _counts(dataset: MMapIndexedDataset) -> Counts:
    """Return what the manifest of a part or of an output tells of it."""
    assert dataset.manifest is not None
    return Counts(**dataset.manifest.provenance["counts"])
