"""Reading the tensors of a checkpoint, one at a time, from whatever files they lie in; and writing them."""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model_center.model.safetensors_writer import SafetensorsWriter
from model_center.model.source import CONFIG_NAME, Source, read_json

# In the order in which they are looked for. A name with ".index.json" lists the files over which tensors are spread.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pt",
)
MAX_FILE_BYTES = 5 * 10**9


class TensorFile(Protocol):
    """One file of tensors."""

    def names(self) -> list[str]:
        """The names of its tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""


class SafetensorsFile:
    """A `.safetensors` file.

    It is mapped into memory for each tensor anew, so that the pages of a tensor go with it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error

    def names(self) -> list[str]:
        """The names of its tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


class TorchFile:
    """A file that `torch.save` wrote; nothing but tensors is read from it.

    It is mapped into memory anew before the pages that were read come to more than its largest tensor.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._is_mapped = file.read(4) == b"PK\x03\x04"  # files of PyTorch before 1.6 cannot be
        try:
            content = self._load()
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a dictionary of tensors: {error}") from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{path} must hold a dictionary of tensors, but holds something else")
        self._tensors: dict[str, Tensor] = content
        self._largest = max((tensor.nbytes for tensor in content.values()), default=0)
        self._read_bytes = 0

    def _load(self) -> Any:
        return torch.load(self._path, map_location="cpu", weights_only=True, mmap=self._is_mapped)

    def names(self) -> list[str]:
        """The names of its tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        size = self._tensors[name].nbytes
        if self._is_mapped and self._read_bytes + size > self._largest:
            self._tensors, self._read_bytes = self._load(), 0
        self._read_bytes += size
        return self._tensors[name]


class Checkpoint:
    """The tensors of a checkpoint by name, whatever the number and kind of its files.

    Args:
        source: where to look.

    Attributes:
        paths: all files that belong to it, the index first if there is one.

    Raises:
        FileNotFoundError: the place holds no weights; the message lists what was looked for.
        ValueError: a file is truncated, foreign, or disagrees with the index.
    """

    def __init__(self, source: Source) -> None:
        self.description = source.description
        for name in WEIGHT_NAMES:
            path = source.file(name)
            if path is not None:
                break
        else:
            raise FileNotFoundError(f"{source.description} holds no weights; looked for {', '.join(WEIGHT_NAMES)}")
        self.path = path
        self.paths = [path]
        self._files: dict[str, TensorFile]
        if path.name.endswith(".index.json"):
            self._files = self._open_shards(source, path)
        else:
            file = _open(path)
            self._files = dict.fromkeys(file.names(), file)

    def _open_shards(self, source: Source, index: Path) -> dict[str, TensorFile]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} must hold a `weight_map` from tensor names to file names, but has none")
        paths = {name: source.file(name) for name in sorted(set(weight_map.values()))}
        if absent := [name for name, path in paths.items() if path is None]:
            raise FileNotFoundError(f"{index} names files that are missing from {source.description}: {absent}")
        present = {name: path for name, path in paths.items() if path is not None}
        self.paths += present.values()
        files = {name: _open(path) for name, path in present.items()}
        held = {name: frozenset(file.names()) for name, file in files.items()}
        if lost := [tensor for tensor, name in weight_map.items() if tensor not in held[name]]:
            raise ValueError(f"{index} names tensors that its files do not hold: {lost}")
        return {tensor: files[name] for tensor, name in weight_map.items()}

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._files[name].shape(name)

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        return self._files[name].read(name)


def _open(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def write_checkpoint(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    max_file_bytes: int = MAX_FILE_BYTES,
    others: Iterable[Path] = (),
) -> None:
    """Writes `config.json` and the tensors as safetensors files, so that a directory never looks finished but is not.

    A new directory appears under its name only when it is complete. In a directory that exists already, other files
    stay, and the config, without which nothing loads, is replaced last.

    Args:
        directory: where to write.
        config: the content of `config.json`.
        tensors: tensors by name, asked for one after the other; a mapping may make each when it is asked for.
        max_file_bytes: a file is closed when the next tensor would make it larger; several files get an index.
        others: files of which the directory gets copies, a tokenizer's for instance.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"`directory` must be a directory, but {target} is a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _scratch_directory(target) as scratch:
        # Files of one checkpoint must never stand beside those of another one under its names.
        series = f"model-{uuid4().hex[:8]}" if any(target.glob("*.index.json")) else "model"
        _write_tensors(scratch, tensors, max_file_bytes, series)
        (scratch / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in others:
            shutil.copyfile(path, scratch / path.name)
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if not target.exists():
            scratch.rename(target)
            return
        written = {path.name for path in scratch.iterdir()}
        for name in sorted(
            written - {CONFIG_NAME}, key=lambda name: name.endswith(".json")
        ):  # an index after its files
            (scratch / name).replace(target / name)
        for path in target.iterdir():
            if path.name not in written and (path.name in WEIGHT_NAMES or path.match("model-*-of-*.safetensors")):
                path.unlink()
        (scratch / CONFIG_NAME).replace(target / CONFIG_NAME)


@contextmanager
def _scratch_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target`, gone afterwards unless it was renamed."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_tensors(directory: Path, tensors: Mapping[str, Tensor], max_file_bytes: int, series: str) -> None:
    parts: list[list[str]] = []
    remaining, total = iter(tensors), 0
    name = next(remaining, None)
    while name is not None or not parts:
        held: list[str] = []
        with SafetensorsWriter(directory / f"part-{len(parts)}", tensors) as file:
            while name is not None:
                tensor = tensors[name]
                if held and file.data_bytes + tensor.nbytes > max_file_bytes:
                    break
                file.add(name, tensor)
                del tensor
                held.append(name)
                name = next(remaining, None)
        parts.append(held)
        total += file.data_bytes
    if len(parts) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file_name = f"{series}-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
