"""Moving tensors between a checkpoint and a model along weight rules, strictly and a few at a time."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model_center.engine import current_engine
from model_center.model.checkpoint import Checkpoint
from model_center.model.rules import Row, Table

logger = logging.getLogger(__name__)

_BATCH_BYTES = 2**27  # held at a time: a tensor by itself would make engines walk through the model for each


@dataclass
class Problems:
    """What keeps a checkpoint from being loaded, collected so that all of it is reported at once."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def raise_if_any(self, what: str) -> None:
        """Raises a ValueError that lists everything, if there is anything."""
        kinds = {
            "missing from the checkpoint": self.missing,
            "unexpected in the checkpoint": self.unexpected,
            "of the wrong shape": self.misshaped,
            "copies that differ": self.differing,
        }
        lines = [
            line
            for kind, items in kinds.items()
            if items
            for line in (f"{len(items)} {kind}:", *(f"  {item}" for item in items))
        ]
        if lines:
            raise ValueError("\n".join([f"cannot load {what}:", *lines]))


@dataclass(frozen=True)
class WeightImport:
    """One import of a checkpoint into a model.

    The model's heads alone may be absent from the checkpoint as a whole (they keep their fresh values) or left over
    in it; both are said once, by name, in a log message. Everything else must match to the last name and shape.

    Attributes:
        model: name of the model's class.
        wanted: shapes of its tensors by name.
        checkpoint: the tensors.
        rows: what becomes what, for all tensors that the family can have.
        table: the other conventions of the checkpoint, or None where it uses our own names.
        heads: names of our head modules.
    """

    model: str
    wanted: Mapping[str, torch.Size]
    checkpoint: Checkpoint
    rows: Sequence[Row]
    table: Table | None
    heads: tuple[str, ...]

    def check(self) -> "Imported":
        """Checks that everything fits, and says what is absent or left over.

        Raises:
            ValueError: names every missing, unexpected and mis-shaped tensor.
        """
        imported = self.plan()
        imported.problems.raise_if_any(f"{self.checkpoint.path} into {self.model}")
        self._say(imported.absent, imported.left_over)
        return imported

    def plan(self) -> "Imported":
        """What the checkpoint has for the model, with its problems."""
        held = dict(self._canonical())
        found = self._sources(held)
        absent, missing = self._absent_heads({name for row in found for name in row.ours})
        loaded = {row: source for row, source in found.items() if not self._is_in(row.ours[0], absent)}
        left_over, unexpected = self._left_over(held)
        problems = Problems(missing, unexpected)
        for row, source in loaded.items():
            self._check(row, source, held, problems)
        sources = {row: held[source] for row, source in loaded.items()}
        return Imported(self.checkpoint, sources, problems, absent, left_over)

    def _canonical(self) -> list[tuple[str, str]]:
        """Canonical name and name in the checkpoint, for all tensors that mean something."""
        if self.table is None:
            return [(name, name) for name in self.checkpoint.names()]
        pairs = [(self.table.canonical(name), name) for name in self.checkpoint.names()]
        return [(canonical, name) for canonical, name in pairs if not self.table.is_derived(canonical)]

    def _sources(self, held: Mapping[str, str]) -> dict[Row, str]:
        """The tensor that each row reads, for rows of tensors that this model has."""
        sources = {}
        for row in self.rows:
            names = [*row.theirs, *([row.fallback] if row.fallback else [])]
            source = next((name for name in names if name in held), None)
            if source is not None and all(name in self.wanted for name in row.ours):
                sources[row] = source
        return sources

    def _absent_heads(self, found: set[str]) -> tuple[list[str], list[str]]:
        """The heads of which nothing but fallbacks is there, and what is missing elsewhere."""
        fallbacks = {name for row in self.rows if row.fallback for name in row.ours}
        absent = []
        for head in self.heads:
            names = [name for name in self.wanted if self._is_in(name, [head])]
            if names and not found.intersection(names) - fallbacks and not fallbacks.issuperset(names):
                absent.append(head)
        return absent, [name for name in self.wanted if name not in found and not self._is_in(name, absent)]

    def _left_over(self, held: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """What the checkpoint holds for heads that this model lacks, and what nobody expects."""
        head_names: set[str] = set()
        used: set[str] = set()
        for row in self.rows:
            if all(name in self.wanted for name in row.ours):
                used.update(row.theirs, [row.fallback] if row.fallback else [])
            elif self._is_in(row.ours[0], self.heads):
                head_names.update(row.theirs)
        left_over: list[str] = []
        unexpected: list[str] = []
        for canonical, name in held.items():
            if canonical in used:
                continue
            unused = self._is_in(name, self.heads) if self.table is None else self.table.is_unused(canonical)
            (left_over if unused or canonical in head_names else unexpected).append(name)
        names = {canonical: name for canonical, name in self._canonical() if held.get(canonical, name) != name}
        return left_over, [*unexpected, *names.values()]  # the latter mean the same as a name that was taken

    def _check(self, row: Row, source: str, held: Mapping[str, str], problems: Problems) -> None:
        shape = self.checkpoint.shape(held[source])
        try:
            tensors = row.to_ours(torch.empty(shape, device="meta"))
        except ValueError as error:
            problems.misshaped.append(f"{held[source]} {shape}: {error}")
            return
        for name, tensor in zip(row.ours, tensors, strict=True):
            if tensor.shape != (expected := self.wanted[name]):
                problems.misshaped.append(
                    f"{name} is {tuple(tensor.shape)} (from {held[source]} {shape}), must be {tuple(expected)}"
                )
        others = [other for other in self.rows if other is not row and set(other.ours) <= self.wanted.keys()]
        elsewhere = {other.theirs[0] for other in others}
        for name in set(row.theirs).intersection(held) - {source} - elsewhere:
            if not torch.equal(self.checkpoint.read(held[name]), self.checkpoint.read(held[source])):
                problems.differing.append(f"{held[name]} and {held[source]}")

    def _say(self, absent: Sequence[str], left_over: Sequence[str]) -> None:
        if absent:
            logger.warning("%s has no weights for %s; it is newly initialised", self.checkpoint.path, ", ".join(absent))
        if left_over:
            message = "%s holds weights that this %s has no use for: %s"
            logger.warning(message, self.checkpoint.path, self.model, left_over)

    @staticmethod
    def _is_in(name: str, heads: Sequence[str]) -> bool:
        return name.partition(".")[0] in heads


class Imported(Mapping[str, Tensor]):
    """The tensors of a checkpoint under our names, each read when it is asked for.

    Args:
        checkpoint: the tensors.
        sources: what becomes what, and the tensor of the checkpoint that it is made of.
        problems: what keeps the checkpoint from being loaded.
        absent: heads that it does not hold.
        left_over: tensors of it that the model has no use for.

    Attributes:
        rows: the rule that makes each of our tensors.
        sources: the name in the checkpoint of what each of our tensors is made of.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sources: Mapping[Row, str],
        problems: Problems,
        absent: Sequence[str],
        left_over: Sequence[str],
    ) -> None:
        self._checkpoint = checkpoint
        self.rows = {name: row for row in sources for name in row.ours}
        self.sources = {name: sources[row] for name, row in self.rows.items()}
        self.problems, self.absent, self.left_over = problems, absent, left_over

    def __getitem__(self, name: str) -> Tensor:
        row = self.rows[name]
        return row.to_ours(self._checkpoint.read(self.sources[name]))[row.ours.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def copy_into(self, model: torch.nn.Module) -> None:
        """Copies everything, a few tensors at a time."""
        batch: dict[str, Tensor] = {}
        for name, tensor in self.items():
            batch[name] = tensor
            if sum(tensor.nbytes for tensor in batch.values()) > _BATCH_BYTES:
                current_engine().load_state_dict(model, batch)
                batch.clear()
        current_engine().load_state_dict(model, batch)


class Exported(Mapping[str, Tensor]):
    """The tensors of a model under the other side's names, each made when it is asked for.

    Args:
        state: our tensors by name.
        rows: what becomes what.
        rename: what turns a row's name into the one that is written.

    Raises:
        ValueError: there are tensors that no rule explains; or, when it is asked for, one that the other side cannot
            express.
    """

    def __init__(self, state: Mapping[str, Tensor], rows: Sequence[Row], rename: Callable[[str], str]) -> None:
        usable = [row for row in rows if all(name in state for name in row.ours)]
        covered = {name for row in usable for name in row.ours}
        if unexplained := [name for name in state if name not in covered]:
            raise ValueError(f"the other side has no place for these tensors: {', '.join(unexplained)}")
        self._state = state
        self._rows = {rename(row.theirs[0]): row for row in usable}

    def __getitem__(self, name: str) -> Tensor:
        row = self._rows[name]
        names = (*row.ours, *row.beside)
        tensors = [self._state[name] for name in names]
        try:
            for operation in reversed(row.operations):
                tensors = operation.to_theirs(tensors)
        except ValueError as error:
            raise ValueError(f"cannot export {' and '.join(names)}: {error}") from error
        return tensors[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
