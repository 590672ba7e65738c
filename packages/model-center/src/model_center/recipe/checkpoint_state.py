"""What a checkpoint holds of training: which process writes which tensors into which file, and how they come back."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from model_center.engine import compare_states, current_engine, load_state_dict
from model_center.engine.optim import AdamOptimizer, OptimManager, ReadTensor, Shard
from model_center.model.base import BaseModel
from model_center.model.checkpoint import MAX_FILE_BYTES, Checkpoint, SafetensorsFile
from model_center.model.source import CONFIG_NAME, LocalDirectory, read_json

from .checkpoint_files import Manifest
from .random_states import derive_random_states, random_states, restore_random_states

TRAINING_NAME = "training.json"
_FREE_OPTIONS = ("dropout", "_init_", "dtype", "half", "huggingface_fields")
"""What the names of those model options contain that may change between saving and resuming."""
_NAMED = 5
"""How many of the weights that do not fit are named; of another model, none may fit."""


@dataclass
class TrainingState:
    """All that training needs to go on.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer, saved beside it; None if there is none.
        manager: Optimizers of this package, their schedules, and the loss scale.
        progress: Whatever else the training loop keeps (what JSON can hold); that of the first process is saved.
    """

    model: BaseModel
    tokenizer: Any | None
    manager: OptimManager
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def optimizers(self) -> list[AdamOptimizer]:
        """The optimizers.

        Raises:
            ValueError: there is one that cannot give its state in shards.
        """
        for optimizer in self.manager.optimizers:
            if not isinstance(optimizer, AdamOptimizer):
                raise ValueError(
                    "`manager` must hold AdamOptimizer and AdamOffloadOptimizer only, whose state is saved in shards, "
                    f"but holds a {type(optimizer).__name__}"
                )
        return [optimizer for optimizer in self.manager.optimizers if isinstance(optimizer, AdamOptimizer)]

    def parameter_names(self, optimizer: AdamOptimizer) -> list[list[str]]:
        """Return the names of the model's parameters in each group of an optimizer.

        Raises:
            ValueError: it trains a parameter that is not the model's.
        """
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
        if not all(name for group in groups for name in group):
            raise ValueError("`manager` must train parameters of `model` only, but trains others too")
        return groups

    def to_json(self) -> dict[str, Any]:
        """Return everything but tensors."""
        return {
            "progress": self.progress,
            "loss_scale": self.manager.scaler.state_dict(),
            "schedules": [schedule and schedule.state_dict() for schedule in self.manager.lr_schedulers],
            "optimizers": [
                {"options": optimizer.options(), "groups": self._shapes(optimizer)} for optimizer in self.optimizers
            ],
        }

    def _shapes(self, optimizer: AdamOptimizer) -> list[dict[str, list[int]]]:
        whole_shape = current_engine().whole_shape
        return [
            {name: list(whole_shape(parameter)) for name, parameter in zip(names, group["params"], strict=True)}
            for names, group in zip(self.parameter_names(optimizer), optimizer.param_groups, strict=True)
        ]


@dataclass(frozen=True)
class Piece:
    """A tensor that this process writes, where to, and what returns it."""

    file: str
    name: str
    read: ReadTensor


class Layout:
    """Which tensor goes into which file: the same on every process.

    The weights are as `save_pretrained` would write them, spread evenly over at least as many files as there are
    processes, each written by one. Of the optimizer, each process writes what it holds; of what all of them hold, it
    writes its share of the elements.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        engine = current_engine()
        self._shapes = engine.state_shapes(state.model)
        named = dict(state.model.named_parameters(remove_duplicate=False))
        self._tensors: dict[str, torch.Tensor] = {**dict(state.model.named_buffers(remove_duplicate=False)), **named}
        sizes = {name: prod(shape) * self._tensors[name].element_size() for name, shape in self._shapes.items()}
        self.total_bytes = sum(sizes.values())
        parts = _parts(sizes, min(MAX_FILE_BYTES, -(-self.total_bytes // engine.world_size)))
        if len(parts) == 1:
            files = ["model.safetensors"]
        else:
            files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        self.weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        self._writers = {file: number % engine.world_size for number, file in enumerate(files)}
        file = rank_file("random", engine.rank, engine.world_size)
        self._own = [Piece(file, name, tensor.detach) for name, tensor in random_states().items()]
        for number, optimizer in enumerate(state.optimizers):
            self._own += self._shards(optimizer, number)

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of the weights' index, if there are several files."""
        if len(self._writers) == 1:
            return None
        return {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}

    def pieces(self) -> Iterator[Piece]:
        """Yield what this process writes; the tensors are those of training, or made when they are read.

        Weights are gathered one by one, so that all processes must go through it to its end.
        """
        engine = current_engine()
        for name, file in self.weight_map.items():
            tensor = self._tensors[name].detach()
            if isinstance(self._tensors[name], torch.nn.Parameter):
                tensor = engine.whole(self._tensors[name], engine.local(tensor)).view(self._shapes[name])
            if self._writers[file] == engine.rank:
                yield Piece(file, name, tensor.detach)
        yield from self._own

    def names(self, file: str) -> list[str]:
        """Return the names of the tensors of a file that this process writes."""
        weights = [name for name, other in self.weight_map.items() if other == file]
        return weights + [piece.name for piece in self._own if piece.file == file]

    def _shards(self, optimizer: AdamOptimizer, number: int) -> Iterator[Piece]:
        engine = current_engine()
        file = rank_file("optimizer", engine.rank, engine.world_size)
        names = [name for group in self._state.parameter_names(optimizer) for name in group]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for shard in optimizer.shards():
            part = slice(0, shard.size)
            replicated = engine.replicated(parameters[shard.index])
            if shard.name == "step":
                if engine.held_range(parameters[shard.index]).start or (replicated and engine.rank):
                    continue  # the process that holds the first element writes it
            elif replicated:
                part = slice(*(shard.size * each // engine.world_size for each in (engine.rank, engine.rank + 1)))
            if part.stop > part.start:
                name = f"{number}/{shard.name}/{shard.start + part.start}/{names[shard.index]}"
                yield Piece(file, name, partial(_part_of, shard, part))


def _part_of(shard: Shard, part: slice) -> torch.Tensor:
    return shard.read()[part]


def _parts(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Divide names, in their order, into parts that are not larger than `most` unless they are a single name."""
    parts: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if parts[-1] and size > room:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= size
    return parts


def rank_file(kind: str, rank: int, world_size: int) -> str:
    """Return the name of a process's own file."""
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True)
class _Stored:
    """Elements of a state from `start` on, in a mapped file."""

    start: int
    tensor: torch.Tensor

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.start + len(self.tensor)


class SavedTraining:
    """A checkpoint that is about to be loaded; of its tensors only what is asked for is read.

    Args:
        path: The checkpoint, whose files are whole.
        manifest: Its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._world_size = manifest.world_size
        self._content = read_json(path / TRAINING_NAME)
        self._weights = Checkpoint(LocalDirectory(path))
        self._states: dict[tuple[int, str, str], list[_Stored]] = {}
        for file_name in manifest.files:
            if not file_name.startswith("optimizer-"):
                continue
            file = SafetensorsFile(path / file_name)
            for key in file.names():
                number, kind, start, name = key.split("/", 3)
                self._states.setdefault((int(number), kind, name), []).append(_Stored(int(start), file.read(key)))
        for parts in self._states.values():
            parts.sort(key=lambda part: part.start)

    def check(self, state: TrainingState) -> None:
        """Compare with what it is to be loaded into.

        Raises:
            ValueError: it does not fit; the message lists every option and the first weights that differ.
        """
        problems = [*self._check_config(state.model), *_first(self._check_weights(state.model), "weights")]
        if schedules := self._check_schedules(state.manager):
            problems.append(schedules)
        if len(state.optimizers) != (count := len(self._content["optimizers"])):
            problems.append(f"optimizers: {count} in the checkpoint, {len(state.optimizers)} here")
        else:
            for number, optimizer in enumerate(state.optimizers):
                found = self._check_optimizer(number, state, optimizer)
                problems += _first((f"optimizer {number}: {problem}" for problem in found), f"optimizer {number}")
        if problems:
            raise ValueError("\n".join([f"the checkpoint {self.path} is of another training:", *problems]))

    def _check_config(self, model: BaseModel) -> Iterator[str]:
        saved, own = read_json(self.path / CONFIG_NAME), json.loads(json.dumps(model.config.to_dict()))
        for name in own | saved:
            free = any(part in name for part in _FREE_OPTIONS)
            if not free and saved.get(name) != own.get(name):
                yield f"model: `{name}` is {saved.get(name)!r} in the checkpoint, {own.get(name)!r} here"

    def _check_weights(self, model: BaseModel) -> Iterator[str]:
        found = {name: torch.Size(self._weights.shape(name)) for name in self._weights.names()}
        mismatch = compare_states(current_engine().state_shapes(model), found)
        yield from (f"weights: {line.strip()}" for line in str(mismatch).splitlines())

    def _check_schedules(self, manager: OptimManager) -> str | None:
        expected = [None if schedule is None else sorted(schedule.state_dict()) for schedule in manager.lr_schedulers]
        found = [None if schedule is None else sorted(schedule) for schedule in self._content["schedules"]]
        return None if found == expected else f"schedules: of {found} in the checkpoint, of {expected} here"

    def _check_optimizer(self, number: int, state: TrainingState, optimizer: AdamOptimizer) -> Iterator[str]:
        whole_shape = current_engine().whole_shape
        expected = _by_name(
            {name: list(whole_shape(parameter)) for name, parameter in zip(names, group["params"], strict=True)}
            for names, group in zip(state.parameter_names(optimizer), optimizer.param_groups, strict=True)
        )
        found = _by_name(self._content["optimizers"][number]["groups"])
        for name in expected | found:
            if name not in found:
                yield f"missing: {name}"
            elif name not in expected:
                yield f"unexpected: {name}"
            elif found[name] != expected[name]:
                group, shape = found[name]
                yield (
                    f"{name} is of group {group} and shape {shape} in the checkpoint, of group {expected[name][0]} and "
                    f"shape {expected[name][1]} here"
                )
            else:
                yield from self._check_coverage(number, name, prod(expected[name][1]))

    def _check_coverage(self, number: int, name: str, numel: int) -> Iterator[str]:
        kinds = [kind for other, kind, parameter in self._states if (other, parameter) == (number, name)]
        for kind in kinds:
            position = 0
            for part in self._states[number, kind, name]:
                position = part.stop if part.start == position else -1
            if position != (1 if kind == "step" else numel):
                yield f"the parts of `{kind}` of {name} do not make a whole"

    def restore(self, state: TrainingState) -> dict[str, Any]:
        """Load everything; `check` has been passed.

        Returns:
            The progress that was saved.
        """
        tensors = {name: self._weights.read(name) for name in self._weights.names()}
        load_state_dict(state.model, tensors, source=f"the checkpoint {self.path}")
        for number, optimizer in enumerate(state.optimizers):
            self._restore_optimizer(number, state, optimizer)
        for schedule, saved in zip(state.manager.lr_schedulers, self._content["schedules"], strict=True):
            if schedule is not None:
                schedule.load_state_dict(saved)
        scaler, saved_scaler = state.manager.scaler, self._content["loss_scale"]
        state.manager.scaler = scaler.resumed(
            saved_scaler["scale"], saved_scaler["steps_since_change"], enabled=saved_scaler["enabled"]
        )
        self._restore_random_states()
        progress: dict[str, Any] = self._content["progress"]
        return progress

    def _restore_optimizer(self, number: int, state: TrainingState, optimizer: AdamOptimizer) -> None:
        names = [name for group in state.parameter_names(optimizer) for name in group]

        def read(index: int, kind: str, held: range) -> torch.Tensor | None:
            parts = self._states.get((number, kind, names[index]))
            if parts is None:
                return None
            wanted = [
                part.tensor[max(held.start - part.start, 0) : held.stop - part.start]
                for part in parts
                if part.start < held.stop and held.start < part.stop
            ]
            return wanted[0] if len(wanted) == 1 else torch.cat(wanted)

        saved = self._content["optimizers"][number]["options"]
        optimizer.load_shards(_numbered_as(optimizer, saved), read)

    def _restore_random_states(self) -> None:
        rank = current_engine().rank
        known = rank < self._world_size
        file = SafetensorsFile(self.path / rank_file("random", rank if known else 0, self._world_size))
        # Copies: the generators keep what they are given, and the file may be deleted.
        states = {name: file.read(name).clone() for name in file.names()}
        if known:
            restore_random_states(states)
        else:
            derive_random_states(states, rank)


def _first(problems: Iterable[str], kind: str) -> list[str]:
    """Return the first problems of a kind, and how many more there are."""
    listed = list(problems)
    more = len(listed) - _NAMED
    return listed if more <= 0 else [*listed[:_NAMED], f"{kind}: and {more} more"]


def _numbered_as(optimizer: AdamOptimizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Number the parameters of saved options as this optimizer does: they are matched by their names."""
    groups = optimizer.options()["param_groups"]
    renumbered = [
        {**saved, "params": own["params"]} for saved, own in zip(options["param_groups"], groups, strict=True)
    ]
    return {**options, "param_groups": renumbered}


def _by_name(groups: Iterable[Mapping[str, list[int]]]) -> dict[str, tuple[int, list[int]]]:
    """Return group and shape by name."""
    return {name: (number, shape) for number, group in enumerate(groups) for name, shape in group.items()}
