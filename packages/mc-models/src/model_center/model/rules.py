"""Weight rules: tables that say which tensor of a Transformers checkpoint is which of ours.

A table serves three readers: import, export, and the test that freezes names. It is total and strict: what no row
explains is an error, and all problems of a checkpoint are reported at once.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from model_center.model.operations import Operation, Scale


@dataclass(frozen=True)
class Rule:
    """One row of a table.

    Names are patterns: `{i}` is each layer's number, `{i+1}` the number after it (for all layers but the last),
    `{last}` the last layer's number, and a final `*` is `weight` and `bias`. The number of layers is that of the stack
    (`encoder` or `decoder`) with which our name begins.

    Attributes:
        ours: our name, or names where one of their tensors holds several of ours.
        theirs: their name; where there are several, export writes the first, and the others are equal copies of it
            that a checkpoint may hold besides or instead.
        operations: what turns theirs into ours, in this order.
        fallback: their tensor that is meant when the checkpoint has none of `theirs`.
        beside: our tensors of other rules that the last operation gets after `ours` on the way to theirs.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    fallback: str | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A rule with its patterns filled in."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    operations: tuple[Operation, ...]
    fallback: str | None
    beside: tuple[str, ...] = ()

    def to_ours(self, theirs: Tensor) -> list[Tensor]:
        """What our names stand for, made of their tensor.

        Raises:
            ValueError: its shape does not allow it.
        """
        tensors = [theirs]
        for operation in self.operations:
            tensors = operation.to_ours(tensors)
        return tensors


@dataclass(frozen=True)
class Table:
    """The weight rules of a family.

    Attributes:
        rules: the rows.
        prefix: what Transformers puts in front of the names of the bare model inside a model with a head ("bert.").
        architecture: the Transformers class that has our language-model head, for export.
        classifier: the one that has our classification head, or None if there is none.
        unprefixed: beginnings of names that do not get the prefix: the heads.
        derived: patterns of names that hold nothing of their own (buffers); dropped without a word.
        unused: patterns of names that we have no module for; dropped with a word.
        renamed: (pattern, replacement) for names of older checkpoints.
    """

    rules: Sequence[Rule]
    prefix: str
    architecture: str
    classifier: str | None = None
    unprefixed: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """Their name as the rules write it: without the prefix, and in today's form."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name.removeprefix(self.prefix)

    def exported(self, name: str) -> str:
        """The name under which Transformers' model with a head has a tensor."""
        return name if name.startswith(self.unprefixed) else self.prefix + name

    def is_derived(self, name: str) -> bool:
        """Whether a canonical name holds nothing of its own."""
        return any(re.fullmatch(pattern, name) for pattern in self.derived)

    def is_unused(self, name: str) -> bool:
        """Whether a canonical name belongs to something that we do not have."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


def within(ours: str, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    """Rules for the members of a module: `names` is our name -> theirs, inside `ours` and `theirs`."""
    return [Rule(f"{ours}.{our}", f"{theirs}.{their}") for our, their in names.items()]


def attention(ours: str, theirs: str, query: str, key: str, value: str, output: str) -> list[Rule]:
    """Rules for the four projections of the attention in block `ours`, by their names inside `theirs`."""
    names = {"project_q": query, "project_k": key, "project_v": value, "attention_out": output}
    return [Rule(f"{ours}.self_attention.{our}.*", f"{theirs}.{their}.*") for our, their in names.items()]


def scaled(rules: Iterable[Rule], factors: Mapping[str, float]) -> list[Rule]:
    """The rules, with ours multiplied by a factor where our one name ends in a key of `factors`."""
    changed = []
    for rule in rules:
        name = rule.ours if isinstance(rule.ours, str) else rule.ours[0]
        added = [Scale(factor) for ending, factor in factors.items() if factor != 1 and name.endswith(ending)]
        changed.append(replace(rule, operations=(*rule.operations, *added)))
    return changed


def expand(rules: Iterable[Rule], depths: Mapping[str, int]) -> list[Row]:
    """The rules for a model with the given number of layers in each stack."""
    return [row for rule in rules for row in _expand(rule, depths)]


def _expand(rule: Rule, depths: Mapping[str, int]) -> Iterator[Row]:
    ours = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
    theirs = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
    depth = depths.get(ours[0].partition(".")[0], 0)
    text = " ".join((*ours, *theirs))
    if "{i+1}" in text:
        numbers = range(depth - 1)
    elif "{i}" in text:
        numbers = range(depth)
    else:
        numbers = range(1)
    for number in numbers:
        for part in ("weight", "bias") if text.endswith("*") else ("",):
            filled = {"{i}": str(number), "{i+1}": str(number + 1), "{last}": str(depth - 1), "*": part}
            yield Row(
                tuple(_fill(name, filled) for name in ours),
                tuple(_fill(name, filled) for name in theirs),
                rule.operations,
                rule.fallback and _fill(rule.fallback, filled),
                tuple(_fill(name, filled) for name in rule.beside),
            )


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    for placeholder, value in values.items():
        pattern = pattern.replace(placeholder, value)
    return pattern
