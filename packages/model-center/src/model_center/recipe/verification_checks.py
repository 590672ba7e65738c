"""The comparisons of a checkpoint with a Transformers directory, each with its worst entries by name."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import inf, isnan

from torch import Tensor

from model_center.model.operations import PadRows
from model_center.model.rules import Row, expand

from .stored_models import StoredModel
from .verification_runs import Observed, gradients_as_theirs
from .verification_sample import Sample

SMALLEST_GRADIENT = 1e-3
"""Gradients are compared relatively to at least this share of the largest one: some are nothing but rounding errors."""


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from its counterpart.

    Attributes:
        name: Its name here.
        counterpart: Its name in the Transformers directory, or what else tells where.
        value: The largest difference of an element, by the largest element there.
    """

    name: str
    counterpart: str
    value: float


@dataclass(frozen=True)
class Check:
    """One kind of comparison.

    Attributes:
        name: What is compared.
        compared: How many of them.
        problems: What is wrong, in words, where it cannot be measured.
        tolerance: The largest difference that passes, None where nothing is measured.
        worst: The largest differences, the largest first.
        notes: What is worth knowing, but not wrong.
    """

    name: str
    compared: int
    problems: tuple[str, ...] = ()
    tolerance: float | None = None
    worst: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there is nothing wrong; what is no number never passes."""
        return not self.problems and all(each.value <= (self.tolerance or 0.0) for each in self.worst)


@dataclass(frozen=True)
class Measure:
    """How a difference that can be measured is judged and told.

    Attributes:
        tolerance: The largest one that passes.
        worst: How many are told.
    """

    tolerance: float
    worst: int

    def check(
        self, name: str, found: Iterable[Difference], problems: Iterable[str] = (), notes: Iterable[str] = ()
    ) -> Check:
        """Judge differences."""
        ordered = sorted(found, key=lambda each: -inf if isnan(each.value) else -each.value)
        return Check(name, len(ordered), tuple(problems), self.tolerance, tuple(ordered[: self.worst]), tuple(notes))


def check_names(ours: StoredModel, theirs: StoredModel) -> Check:
    """Whether every weight of one side has its counterpart on the other, with the same shape."""
    table, _ = ours.model.counterpart()
    problems: list[str] = []
    notes: list[str] = []
    here, there = ours.weights, theirs.weights
    missing_here = dict.fromkeys([*here.problems.missing, *(name for name in there if name not in here)])
    missing_there = dict.fromkeys([*there.problems.missing, *(name for name in here if name not in there)])
    for side, missing, other in (("here", missing_here, there), ("there", missing_there, here)):
        for name in missing:
            source = other.sources.get(name, name)
            problems.append(f"{name}{f' ({source})' * (source != name)} is missing {side}")
    for side, weights in (("here", here), ("there", there)):
        unused = [name for name in weights.left_over if table.is_unused(table.canonical(name))]
        unexpected = [*weights.problems.unexpected, *(name for name in weights.left_over if name not in unused)]
        problems += [f"{name} {side} has no counterpart" for name in unexpected]
        problems += [f"{side}, {problem}" for problem in weights.problems.misshaped]
        problems += [f"copies {side} differ: {problem}" for problem in weights.problems.differing]
        notes += [f"{name} {side} is not compared: this family has no use for it" for name in unused]
    wanted, given = (stored.model.state_dict() for stored in (ours, theirs))
    both = [name for name in here if name in there]
    for name in both:
        if wanted[name].shape != given[name].shape:
            problems.append(f"{name} is {tuple(wanted[name].shape)} here, {tuple(given[name].shape)} there")
    return Check("names", len(both), tuple(problems), notes=tuple(notes))


def check_configuration(ours: StoredModel, theirs: StoredModel) -> Check:
    """Whether the options that change what is computed are the same."""
    config = ours.model.config
    differing = config.differences(theirs.model.config)
    problems = [f"{name} is {here!r} here, {there!r} there" for name, (here, there) in differing.items()]
    return Check("configuration", len(fields(config)), tuple(problems))


def check_weights(ours: StoredModel, theirs: StoredModel, measure: Measure) -> Check:
    """How far the weights are from each other, two at a time."""
    found = []
    for name, source in theirs.weights.sources.items():
        # Rows that only fill up our vocabulary are not stored there, and mean nothing.
        padding = sum(each.rows for each in theirs.weights.rows[name].operations if isinstance(each, PadRows))
        here, there = (stored.weights[name].double() for stored in (ours, theirs))
        rows = len(here) - padding
        found.append(Difference(name, source, _relative(here[:rows], there[:rows])))
    types = [next(iter(stored.weights.values())).dtype for stored in (ours, theirs)]
    note = f"stored in {types[0]} here, {types[1]} there: differences of its rounding are to be expected"
    return measure.check("weights", found, notes=[note.replace("torch.", "")] if types[0] != types[1] else [])


def check_loading(theirs: StoredModel, missing: Iterable[str]) -> Check:
    """Whether Transformers itself finds all weights.

    Args:
        theirs: The Transformers directory.
        missing: What it says that it has not found, by the names of the weight rules.
    """
    explained: set[str] = set()
    for row in _rows(theirs):
        if all(name in theirs.weights for name in row.ours) or row.ours[0].partition(".")[0] in theirs.weights.absent:
            explained.update(row.theirs, [row.fallback] if row.fallback else [])
    lost = [name for name in missing if name not in explained]
    problems = [f"{name}: Transformers finds no weights for it there, and makes new ones" for name in lost]
    return Check("loading there", len(theirs.weights), tuple(problems))


def check_states(found: Observed, expected: Observed, measure: Measure) -> Check:
    """Hidden states of every layer."""
    differences = [
        Difference(name, name, _relative(found.states[name], states)) for name, states in expected.states.items()
    ]
    return measure.check("hidden states", differences)


def check_logits(found: Observed, expected: Observed, sample: Sample, measure: Measure) -> Check:
    """Logits, the worst of each row of the sample by position and id."""
    if found.logits is None or expected.logits is None:
        return measure.check("logits", [], notes=["neither side has a head; hidden states are compared instead"])
    scale = _largest(expected.logits)
    deviations = (found.logits - expected.logits).abs()
    rows, positions = sample.positions.nonzero(as_tuple=True)
    differences = []
    for row in rows.unique().tolist():
        part, where = deviations[rows == row], positions[rows == row]
        worst = int(part.argmax())
        position, token_id = where[worst // part.shape[1]], worst % part.shape[1]
        place = f"position {position}, id {token_id}"
        differences.append(Difference(f"row {row}", place, part.flatten()[worst].item() / scale))
    return measure.check("logits", differences)


def check_gradients(found: Observed, expected: Observed, theirs: StoredModel, measure: Measure) -> Check:
    """The gradient of every parameter."""
    mapped = gradients_as_theirs(theirs.weights.rows, found.gradients, expected.gradients)
    floor = SMALLEST_GRADIENT * max(map(_largest, expected.gradients.values()))
    differences, problems = [], []
    for name, gradient in expected.gradients.items():
        if name in mapped:
            ours, value = mapped[name]
            differences.append(Difference(ours, name, _relative(value, gradient, floor)))
        elif gradient.any():
            problems.append(f"{name} has a gradient there, but none here")
    told = {ours for names, _ in mapped.values() for ours in names.split(", ")}
    for name, gradient in found.gradients.items():
        if name not in told and name in theirs.weights and gradient.any():
            problems.append(f"{name} has a gradient here, but none there")
    silent = [name for name in theirs.weights if name not in found.gradients]
    notes = [f"without a gradient, compared by value only: {', '.join(silent)}"] if silent else []
    return measure.check("gradients", differences, problems, notes)


def _rows(stored: StoredModel) -> list[Row]:
    return expand(stored.model.counterpart()[0].rules, stored.model.config.depths)


def _relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference, by the largest element of what is expected."""
    if found.shape != expected.shape:
        return inf
    return (found - expected).abs().max().item() / (max(_largest(expected), floor) or 1.0)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
