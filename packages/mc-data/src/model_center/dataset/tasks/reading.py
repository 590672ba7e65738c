"""Rows of a task, read from its folder or from rows in memory, and checked."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .task import Row, Task

Splits = Mapping[str, Iterable[Row]]
"""Rows by the name of their split; a `DatasetDict` of the Hugging Face `datasets` library is one."""

SPLIT_NAMES = {"dev": ("val", "dev", "validation"), "val": ("val", "dev", "validation")}
"""The names under which files hold a split, in order of preference; any other split has its own name only."""

LABELLED = {"train", *SPLIT_NAMES, "validation"}


@dataclass(frozen=True)
class Example:
    """One checked row.

    Attributes:
        where: File and line, for messages.
        values: The text of each field of the task.
        label: The class; None if the split is unlabelled or the answer is free text.
        answers: The accepted answers, for free text.
        group: What it is scored together with.
    """

    where: str
    values: dict[str, str]
    label: int | None = None
    answers: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Source:
    """Where the rows of one split come from.

    Attributes:
        name: File name, or the split's name for rows in memory.
        content: The file's bytes, or the rows.
    """

    name: str
    content: bytes | list[Row] = field(repr=False)

    @property
    def digest(self) -> str:
        """Hexadecimal hash of what it holds."""
        content = self.content
        if not isinstance(content, bytes):
            content = json.dumps(content, sort_keys=True, default=str).encode()
        return hashlib.blake2b(content, digest_size=20).hexdigest()

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Each row with its place.

        Raises:
            ValueError: The file cannot be understood; the message names the line.
        """
        if not isinstance(self.content, bytes):
            for number, row in enumerate(self.content):
                yield f"{self.name}, row {number}", row
            return
        try:
            content = gzip.decompress(self.content) if self.name.endswith(".gz") else self.content
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{self.name} is not a whole gzip file: {error}") from error
        lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
        parse = _table if self.name.endswith(".tsv") else _document if self.name.endswith(".json") else _json_lines
        yield from parse(self.name, lines)


def find_source(path: str | Path | Splits, task: Task, split: str) -> Source:
    """Find a split's rows.

    Args:
        path: The folder that holds the task's folder, or rows by split name.
        task: The task.
        split: Name of the split; ``"dev"`` and ``"val"`` mean the same.

    Raises:
        ValueError: There is no such split; the message lists what was looked for and what there is.
    """
    names = SPLIT_NAMES.get(split, (split,))
    if isinstance(path, Mapping):
        for name in names:
            if name in path:
                return Source(f"{task.name} {name}", list(named_labels(path[name])))
        raise ValueError(f"no split {split!r} of {task.name}: the rows given have {list(path)}")
    folders = [Path(path) / name for name in dict.fromkeys((task.name, task.name.lower()))]
    candidates = [folder / pattern.format(split=name) for folder in folders for name in names for pattern in task.files]
    for file in candidates:
        if file.is_file():
            try:
                return Source(str(file), file.read_bytes())
            except OSError as error:
                raise ValueError(f"cannot read {file}: {error}") from error
    present = [file.name for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    if present:
        found = f"its folder holds {', '.join(present[:10])}"
    else:
        found = f"there is no folder {folders[0]}; `path` is the folder that holds {task.name}/"
    looked = ", ".join(file.name for file in candidates[: len(candidates) // len(folders)])
    raise ValueError(f"no split {split!r} of {task.name} in {path}: looked for {looked}; {found}")


def read_examples(source: Source, task: Task, split: str) -> list[Example]:
    """Read and check all rows of a split.

    The rows of ``train`` and ``dev`` need a label; those of another split (``test``) may all go without.

    Raises:
        ValueError: A row is broken, lacks a field or has a label outside the task's set (with file and line), or there
            are no rows at all.
    """
    examples = []
    for where, row in source.rows():
        try:
            flat = [row] if task.unfold is None or _is_flat(row, task) else list(task.unfold(row))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: not a row of {task.name}: {type(error).__name__} {error}") from error
        for number, entry in enumerate(flat):
            examples.append(_example(where if len(flat) == 1 else f"{where}, entry {number}", entry, task))
    if not examples:
        raise ValueError(f"{source.name} has no rows")
    answered = [example.label is not None or bool(example.answers) for example in examples]
    if not all(answered) and (any(answered) or split in LABELLED):
        example = examples[answered.index(False)]
        raise ValueError(
            f"{example.where}: field {task.answers or task.label!r} is missing; only a test split may do without, "
            "and then in all its rows"
        )
    return examples


def named_labels(rows: Iterable[Row]) -> Iterable[Row]:
    """Turn class numbers into names where the rows are a Hugging Face data set, whose order may differ from ours."""
    for column, feature in (getattr(rows, "features", None) or {}).items():
        names = getattr(feature, "names", None)
        if names:
            return _renamed(rows, column, list(names))
    return rows


def _renamed(rows: Iterable[Row], column: str, names: list[str]) -> Iterator[Row]:
    for row in rows:
        value = row[column]
        # The library marks the missing labels of a test split with -1.
        named = {column: names[value]} if isinstance(value, int) and value >= 0 else {}
        yield {key: entry for key, entry in row.items() if key != column} | named


def _is_flat(row: Row, task: Task) -> bool:
    return all(isinstance(row.get(place), str) for place in task.fields.values())


def _json_lines(name: str, lines: list[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{name}:{number}", _json_object(f"{name}:{number}", line)


def _document(name: str, lines: list[bytes]) -> Iterator[tuple[str, Row]]:
    if lines:
        yield name, _json_object(name, b"\n".join(lines))


def _json_object(where: str, text: bytes) -> Row:
    try:
        row = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is a JSON object, but this is {type(row).__name__}")
    return row


def _table(name: str, lines: list[bytes]) -> Iterator[tuple[str, Row]]:
    """Tab-separated values under a header line; quotation marks have no meaning."""
    header: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        try:
            cells = next(csv.reader([line.decode("utf-8")], delimiter="\t", quoting=csv.QUOTE_NONE), [])
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}:{number}: not UTF-8 text ({error})") from error
        if header is None:
            header = cells
        elif cells:
            if len(cells) != len(header):
                raise ValueError(f"{name}:{number}: expected {len(header)} columns {header}, but found {len(cells)}")
            yield f"{name}:{number}", dict(zip(header, cells, strict=True))


def _example(where: str, row: Row, task: Task) -> Example:
    values = {}
    for name, place in task.fields.items():
        value = _look_up(row, place)
        if value is None:
            raise ValueError(f"{where}: field {place!r} is missing; a row of {task.name} has {_places(task)}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {place!r} must be text, but is {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON may escape half a character
            raise ValueError(f"{where}: field {place!r} is not Unicode text ({error})") from error
        values[name] = value
    group = str(_look_up(row, task.group) or "") if task.group else ""
    if task.answers:
        return Example(where, values, answers=_answers(where, _look_up(row, task.answers), task), group=group)
    return Example(where, values, label=_class(where, _look_up(row, task.label), task), group=group)


def _look_up(row: Row, place: str) -> Any:
    """The value at a dotted place; a flattened row may hold it under its last name alone."""
    value: Any = row
    names = place.split(".")
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return row.get(names[-1]) if value is None else value


def _places(task: Task) -> str:
    return ", ".join(task.fields.values())


def _answers(where: str, value: Any, task: Task) -> tuple[str, ...]:
    if isinstance(value, Mapping):  # the Hugging Face form of SQuAD
        value = value.get("text")
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(answer, str) for answer in value):
        raise ValueError(f"{where}: field {task.answers!r} must be a list of texts, but is {value!r}")
    return tuple(dict.fromkeys(value))


def _class(where: str, value: Any, task: Task) -> int | None:
    if value is None:
        return None
    for number, label in enumerate(task.labels):
        if value == label or str(value) == str(label):
            return number
    raise ValueError(f"{where}: field {task.label!r} is {value!r}, but must be one of {list(task.labels)}")
