"""The definition of a task: what a row holds, and the texts that models read.

A task is defined once, for all model families. Encoders (BERT) read its `inputs`, with a class as the answer; the other
families read a `Prompt`, with a word (or free text) as the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .template import MASK, Template

Row = Mapping[str, Any]
Label = str | int | bool

CLASS_METRICS = ("accuracy", "macro_f1", "binary_f1", "group_exact_match")
"""Names of the measures of classes that `model_center.dataset.evaluation` knows."""
TEXT_METRICS = ("exact_match", "token_f1")
"""Those of free text."""


@dataclass(frozen=True)
class Prompt:
    """A text with a slot for the answer.

    Attributes:
        template: The text, with fields in braces and ``{mask}`` where the answer belongs. Decoders (GPT-2) read it up
            to the mask.
        words: The verbalizer: the word that stands for each class, in the order of the task's labels. Empty when the
            answer is free text.
    """

    template: str
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if Template(self.template).fields.count(MASK) != 1:
            raise ValueError(f"a prompt's template needs {{mask}} exactly once, but is {self.template!r}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: the fields of a row, its label names, and the texts made of them.

    Attributes:
        name: The task's name, and that of its folder.
        fields: The fields that the texts use: for each, where a row holds it (``"target.span1_text"`` is nested).
        labels: The values of the label in the order of the classes; empty when the answer is free text.
        label: Where a row holds its label.
        answers: Where a row holds the list of accepted answers, when the answer is free text.
        inputs: For encoders: one template a segment (one or two segments). A multiple-choice task has several such
            inputs, one a choice.
        prompt: For all other families.
        prompts: Prompts of single families (``"cpm1"``, …), where they differ.
        flexible: The field that is shortened when a text is longer than the limit. No other ever is.
        group: Where a row holds the key of what is scored together (MultiRC's question), if anything.
        swap_in_training: Two fields. In the training split, families that read the prompt also get each row with
            these fields and its label swapped, so that the position of a choice tells nothing.
        files: Names of a split's file inside the task's folder, in order of preference.
        unfold: Turns a nested row into flat ones.
        metrics: Names of the official measures, out of `CLASS_METRICS` or, when the answer is free text,
            `TEXT_METRICS`. Without any, the accuracy, or both of these.
    """

    name: str
    fields: Mapping[str, str]
    labels: tuple[Label, ...] = ()
    label: str = "label"
    answers: str | None = None
    inputs: tuple[tuple[str, ...], ...] = ()
    prompt: Prompt | None = None
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    flexible: str | None = None
    group: str | None = None
    swap_in_training: tuple[str, str] | None = None
    files: tuple[str, ...] = ("{split}.jsonl", "{split}.jsonl.gz")
    unfold: Callable[[Row], Iterator[Row]] | None = field(default=None, repr=False)
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        if bool(self.labels) == bool(self.answers):
            raise ValueError(f"{where} needs either `labels` or `answers`")
        if len({str(label) for label in self.labels}) != len(self.labels):
            raise ValueError(f"{where}: `labels` must differ from each other, but are {list(self.labels)}")
        for segments in self.inputs:
            if len(segments) not in (1, 2):
                raise ValueError(f"{where}: an input has one or two segments, but {list(segments)} are given")
        prompts = [self.prompt, *self.prompts.values()]
        templates = [text for segments in self.inputs for text in segments]
        for prompt in filter(None, prompts):
            templates.append(prompt.template)
            if len(prompt.words) != len(self.labels):
                raise ValueError(
                    f"{where}: a prompt needs one word for each label ({len(self.labels)}), "
                    f"but has {list(prompt.words)}"
                )
        if not templates:
            raise ValueError(f"{where} needs `inputs` (for encoders) or a `prompt` (for the others)")
        self._set_metrics(where)
        used = {name for text in templates for name in Template(text).fields} - {MASK}
        used |= {name for name in (self.flexible, *(self.swap_in_training or ())) if name}
        if self.swap_in_training and len(self.labels) != 2:
            raise ValueError(f"{where}: `swap_in_training` needs two labels, but there are {list(self.labels)}")
        if used - set(self.fields):
            raise ValueError(f"{where} uses {sorted(used - set(self.fields))}, but its fields are {list(self.fields)}")

    def _set_metrics(self, where: str) -> None:
        """Take the usual measures if none are given, and check that they fit what the answers are."""
        answers, known, usual = (
            ("answers", TEXT_METRICS, TEXT_METRICS) if self.answers else ("labels", CLASS_METRICS, ("accuracy",))
        )
        object.__setattr__(self, "metrics", self.metrics or usual)
        for metric in self.metrics:
            if metric not in known:
                raise ValueError(
                    f"{where}: `metrics` has {metric!r}, but known are {', '.join(known)} for a task with `{answers}`"
                )
        if "binary_f1" in self.metrics and len(self.labels) != 2:
            raise ValueError(f"{where}: the metric binary_f1 needs two labels, but there are {list(self.labels)}")
        if "group_exact_match" in self.metrics and self.group is None:
            raise ValueError(f"{where}: the metric group_exact_match needs `group`, the field that rows share")

    def prompt_for(self, family: str) -> Prompt:
        """The prompt that a family reads.

        Raises:
            ValueError: The task has none for it.
        """
        prompt = self.prompts.get(family, self.prompt)
        if prompt is None:
            raise ValueError(f"task {self.name!r} has no prompt for {family!r}: give it `prompt`")
        return prompt

    @classmethod
    def from_yaml(cls, file: str | Path) -> Task:
        """Read a task from a YAML file whose keys are this class's fields.

        Short forms: `fields` may be a list of names; `inputs` may be one template, or a list of two segments.

        Raises:
            ValueError: The file cannot be read, or the definition has an unknown or missing key, or a value that is
                none of such a key.
        """
        import yaml

        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"cannot read the task definition {file}: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file}: a task definition is a mapping from names to values")
        try:
            return cls.from_dict(content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, definition: Mapping[str, Any]) -> Task:
        """Make a task from plain lists, mappings and texts; short forms as in `from_yaml`."""
        known = {entry.name: entry for entry in dataclasses.fields(cls) if entry.name != "unfold"}
        unknown = sorted(set(definition) - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; a task has {', '.join(known)}")
        values = {name: value for name, value in definition.items() if value is not None}
        missing = [name for name in ("name", "fields") if name not in values]
        if missing:
            raise ValueError(f"a task needs {missing[0]!r}")
        return cls(**{name: _READERS[name](name, value) for name, value in values.items()})


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, but is {value!r}")


def _are_texts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def _text(name: str, value: Any) -> str:
    _require(isinstance(value, str), name, "text (in YAML, a number is one in quotes only)", value)
    return str(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    _require(_are_texts(value), name, "a list of texts", value)
    return tuple(value)


def _labels(name: str, value: Any) -> tuple[Label, ...]:
    holds = isinstance(value, list | tuple) and all(isinstance(label, str | int) for label in value)
    _require(holds, name, "a list of texts, integers or booleans", value)
    return tuple(value)


def _fields(name: str, value: Any) -> dict[str, str]:
    named = dict(zip(value, value, strict=True)) if _are_texts(value) else value
    holds = isinstance(named, Mapping) and _are_texts([*named, *named.values()])
    _require(holds, name, "a list of texts, or a mapping from texts to texts", value)
    return dict(named)


def _inputs(name: str, value: Any) -> tuple[tuple[str, ...], ...]:
    if isinstance(value, str):
        return ((value,),)
    if _are_texts(value):
        return (tuple(value),)
    holds = isinstance(value, list | tuple) and all(map(_are_texts, value))
    _require(holds, name, "a template, a list of templates, or a list of such lists", value)
    return tuple(tuple(segments) for segments in value)


def _prompt(name: str, value: Any) -> Prompt:
    if not isinstance(value, Mapping) or "template" not in value:
        raise ValueError(f"a prompt is a mapping with `template` and `words`, but `{name}` is {value!r}")
    words = value.get("words") or ()
    _require(isinstance(words, list | tuple), f"{name}.words", "a list of texts", words)
    for word in words:
        if isinstance(word, bool):
            raise ValueError("`words` must be texts; write them in quotes, since YAML reads No and Yes as booleans")
    return Prompt(template=_text(f"{name}.template", value["template"]), words=tuple(str(word) for word in words))


def _prompts(name: str, value: Any) -> dict[str, Prompt]:
    _require(isinstance(value, Mapping), name, "a mapping from families to prompts", value)
    return {family: _prompt(f"{name}.{family}", prompt) for family, prompt in value.items()}


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "fields": _fields,
    "labels": _labels,
    "inputs": _inputs,
    "prompt": _prompt,
    "prompts": _prompts,
    **dict.fromkeys(("name", "label", "answers", "flexible", "group"), _text),
    **dict.fromkeys(("swap_in_training", "files", "metrics"), _texts),
}
"""How each key of a plain definition is read."""
