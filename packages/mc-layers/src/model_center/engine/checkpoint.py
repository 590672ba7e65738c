"""Checkpoint files: written whole or not at all, and loaded with every problem told at once.

The format is that of `torch.save`: one dictionary of plain names and whole tensors, which any engine reads back.
"""

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from model_center.engine.current import current_engine

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class StateMismatch:
    """How the tensors of a checkpoint differ from those of a model. True if they differ at all.

    Attributes:
        missing: Names that the model has and the checkpoint lacks.
        unexpected: Names that only the checkpoint has.
        misshaped: Names of tensors whose shapes differ, with the model's shape and the checkpoint's.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: Mapping[str, tuple[torch.Size, torch.Size]] | None = None

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        """All differences, one line each."""
        lines = [f"  missing: {name}" for name in self.missing]
        lines += [f"  unexpected: {name}" for name in self.unexpected]
        for name, (expected, found) in (self.misshaped or {}).items():
            lines.append(f"  wrong shape: {name} is {tuple(found)}, must be {tuple(expected)}")
        return "\n".join(lines)


def compare_states(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> StateMismatch:
    """Compares names and shapes.

    Args:
        expected: The model's tensors: shape by name.
        found: The checkpoint's tensors: shape by name.
    """
    return StateMismatch(
        missing=tuple(name for name in expected if name not in found),
        unexpected=tuple(name for name in found if name not in expected),
        misshaped={
            name: (shape, found[name]) for name, shape in expected.items() if name in found and found[name] != shape
        },
    )


def load_state_dict(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], *, strict: bool = True, source: str = "the state"
) -> StateMismatch:
    """Copies whole tensors into a model, converting their data type; nothing is copied if there is an error.

    Args:
        model: The model.
        state: Tensors by plain name.
        strict: Whether missing and unexpected names are errors. Otherwise they are returned. Wrong shapes always are.
        source: Where `state` comes from, for the error message.

    Returns:
        The names that were missing and unexpected.

    Raises:
        ValueError: If names or shapes do not fit; the message lists all of them.
    """
    engine = current_engine()
    mismatch = compare_states(engine.state_shapes(model), {name: tensor.shape for name, tensor in state.items()})
    if mismatch.misshaped or (strict and mismatch):
        raise ValueError(f"{source} does not fit this {type(model).__name__}:\n{mismatch}")
    engine.load_state_dict(model, {name: state[name] for name in state if name not in mismatch.unexpected})
    return mismatch


@contextmanager
def atomic_write(path: FilePath) -> Iterator[IO[bytes]]:
    """Opens a file for writing that takes its name only once it is complete and on disk.

    Whatever happens in between, `path` is either what it was before or the complete new file. What a killed process
    leaves behind is a hidden file beside it.

    Args:
        path: The file to write or replace.

    Raises:
        FileNotFoundError: If the directory does not exist.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the directory of {path} does not exist; create it first")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save(model: torch.nn.Module, path: FilePath) -> None:
    """Writes the parameters and buffers of a model to one file. All processes call it; one writes.

    A process that is killed while saving leaves the previous file as it was.

    Args:
        model: The model.
        path: The file, by custom `*.pt`. Its directory must exist.

    Raises:
        FileNotFoundError: If the directory does not exist.
    """
    engine = current_engine()
    state = engine.state_dict(model)
    if engine.rank == 0:
        with atomic_write(path) as file:
            torch.save(state, file)
    engine.synchronize()


def load(model: torch.nn.Module, path: FilePath, strict: bool = True) -> StateMismatch:
    """Reads a file that `save` wrote (under any engine), or one of BMTrain, into a model.

    Only tensors are unpickled, never code. An optimizer that has already stepped keeps masters of half-precision
    parameters: load its state too, or make a new one.

    Args:
        model: The model.
        path: The file.
        strict: Whether missing and unexpected names are errors. Otherwise they are returned. Wrong shapes always are.

    Returns:
        The names that were missing and unexpected.

    Raises:
        OSError: If there is no such file or it cannot be read.
        ValueError: If it is not a complete checkpoint or does not fit the model; the message lists all problems.
    """
    return load_state_dict(model, _read(path), strict=strict, source=f"the checkpoint {path}")


def _read(path: FilePath) -> Mapping[str, torch.Tensor]:
    Path(path).open("rb").close()  # what goes wrong after this is wrong with the contents
    try:
        # Mapped rather than read: the tensors are copied one by one, so that the host never holds them all.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a complete checkpoint of torch.save ({_first_line(error)})") from error
    if not (isinstance(state, Mapping) and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise ValueError(f"{path} must hold a dictionary of tensors, as `save` writes it, but holds something else")
    return state


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
