"""The definition of a task: what a row holds, and the texts that models read.

A task is defined once, for all model families. Encoders (BERT) read its `inputs`, with a class as the answer; the other
families read a `Prompt`, with a word (or free text) as the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .template import MASK, Template

Row = Mapping[str, Any]
Label = str | int | bool

METRICS = ("accuracy", "macro_f1", "binary_f1", "group_exact_match", "exact_match", "token_f1")
"""Names of the measures that `model_center.dataset.evaluation` knows."""


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
        metrics: Names of the official measures, out of `METRICS`.
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
    metrics: tuple[str, ...] = ("accuracy",)

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
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(f"{where}: `metrics` has {metric!r}, but known are {', '.join(METRICS)}")
        used = {name for text in templates for name in Template(text).fields} - {MASK}
        used |= {name for name in (self.flexible, *(self.swap_in_training or ())) if name}
        if self.swap_in_training and len(self.labels) != 2:
            raise ValueError(f"{where}: `swap_in_training` needs two labels, but there are {list(self.labels)}")
        if used - set(self.fields):
            raise ValueError(f"{where} uses {sorted(used - set(self.fields))}, but its fields are {list(self.fields)}")

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
            ValueError: The file cannot be read, or the definition has an unknown or missing key.
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
        required = ("name", "fields")
        missing = [name for name in required if name not in definition]
        if missing:
            raise ValueError(f"a task needs {missing[0]!r}")
        values = dict(definition)
        names = values["fields"]
        values["fields"] = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        if "inputs" in values:
            values["inputs"] = _inputs(values["inputs"])
        if "prompt" in values:
            values["prompt"] = _prompt(values["prompt"])
        if "prompts" in values:
            values["prompts"] = {family: _prompt(prompt) for family, prompt in values["prompts"].items()}
        for name in ("labels", "swap_in_training", "files", "metrics"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


def _inputs(value: str | Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    if isinstance(value, str):
        return ((value,),)
    if all(isinstance(entry, str) for entry in value):
        return (tuple(value),)
    return tuple(tuple(segments) for segments in value)


def _prompt(value: Any) -> Prompt:
    if not isinstance(value, Mapping) or "template" not in value:
        raise ValueError(f"a prompt is a mapping with `template` and `words`, but is {value!r}")
    words = value.get("words", ())
    for word in words:
        if isinstance(word, bool):
            raise ValueError("`words` must be texts; write them in quotes, since YAML reads No and Yes as booleans")
    return Prompt(template=value["template"], words=tuple(str(word) for word in words))
