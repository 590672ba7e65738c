"""Rows of all file forms, and bad ones: file, line, field and remedy in the message."""

import gzip
import json
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from toy_tokenizer import write_rows

from model_center.dataset.tasks import TASKS, Task
from model_center.dataset.tasks.reading import Example, find_source, read_examples

GOOD = {"question": "is it", "passage": "It is.", "label": True}


def lines(*rows: Any) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def read(path: Any, name: str = "BoolQ", split: str = "train", task: Task | None = None) -> list[Example]:
    task = task or TASKS[name]
    return read_examples(find_source(path, task, split), task, split)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(GOOD, '{"question": "is'), r"train.jsonl:2: not valid JSON \(Unterminated string"),
        (lines(GOOD, "", "[1]"), "train.jsonl:3: a row is a JSON object, but this is list"),
        (
            lines(GOOD, {"question": "is it", "label": True}),
            "train.jsonl:2: field 'passage' is missing; a row of BoolQ has passage, question",
        ),
        (lines({**GOOD, "question": 3}), "train.jsonl:1: field 'question' must be text, but is 3"),
        (lines(GOOD, {**GOOD, "label": "maybe"}), "train.jsonl:2: field 'label' is 'maybe', but must be one of"),
        (lines(GOOD, {**GOOD, "label": None}), "train.jsonl:2: field 'label' is missing; only a test split"),
        ("", "train.jsonl has no rows"),
        ("\n\n", "train.jsonl has no rows"),
        ('{"question": "\ud800"}', r"train.jsonl:1: not valid JSON \('utf-8' codec"),
        (lines({**GOOD, "passage": "\ud800"}), "train.jsonl:1: field 'passage' is not Unicode text"),
    ],
)
def test_broken_rows(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "BoolQ" / "train.jsonl"
    file.parent.mkdir()
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("MultiRC", {"idx": 1, "passage": {"text": "p"}}, "train.jsonl:1: not a row of MultiRC: KeyError 'questions'"),
        ("ReCoRD", {"passage": {"text": "p", "entities": 3}}, "train.jsonl:1: not a row of ReCoRD: TypeError"),
    ],
)
def test_broken_nested_rows(tmp_path: Path, name: str, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write_rows(tmp_path, name, "train.jsonl", lines(row)), name)


def test_missing_splits_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*BoolQ; `path` is the folder that holds BoolQ/"):
        read(tmp_path)
    write_rows(tmp_path, "BoolQ", "train.jsonl", lines(GOOD))
    with pytest.raises(ValueError, match=r"no split 'dev' of BoolQ .* looked for val.jsonl, .* holds train.jsonl"):
        read(tmp_path, split="dev")
    with pytest.raises(ValueError, match=r"no split 'dev' of BoolQ: the rows given have \['train'\]"):
        read({"train": [GOOD]}, split="dev")


def test_compressed_files(tmp_path: Path) -> None:
    file = tmp_path / "BoolQ" / "val.jsonl.gz"
    file.parent.mkdir()
    content = gzip.compress(lines(GOOD, GOOD).encode())
    file.write_bytes(content)
    assert [example.where for example in read(tmp_path, split="dev")] == [f"{file}:1", f"{file}:2"]
    file.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"val.jsonl.gz is not a whole gzip file"):
        read(tmp_path, split="dev")


def test_splits_without_labels(tmp_path: Path) -> None:
    bare = {name: GOOD[name] for name in ("question", "passage")}
    write_rows(tmp_path, "BoolQ", "test.jsonl", lines(bare, bare))
    assert [example.label for example in read(tmp_path, split="test")] == [None, None]
    write_rows(tmp_path, "BoolQ", "test.jsonl", lines(GOOD, bare))
    with pytest.raises(ValueError, match=r"test.jsonl:2: field 'label' is missing"):
        read(tmp_path, split="test")
    write_rows(tmp_path, "BoolQ", "val.jsonl", lines(bare))
    with pytest.raises(ValueError, match=r"val.jsonl:1: field 'label' is missing"):
        read(tmp_path, split="dev")


def test_tables(tmp_path: Path) -> None:
    write_rows(tmp_path, "LCQMC", "train.tsv", 'text_a\ttext_b\tlabel\n开"初\t未婚\t1\n谁\t她\t0\n')
    first, second = read(tmp_path, "LCQMC")
    assert (first.values, first.label) == ({"text_a": '开"初', "text_b": "未婚"}, 1)
    assert second.label == 0
    write_rows(tmp_path, "LCQMC", "train.tsv", "text_a\ttext_b\tlabel\na\tb\t1\na\tb\n")
    with pytest.raises(ValueError, match=r"train.tsv:3: expected 3 columns .*, but found 2"):
        read(tmp_path, "LCQMC")
    (tmp_path / "LCQMC" / "train.tsv").write_bytes(b"text_a\ttext_b\tlabel\n\xff\tb\t1\n")
    with pytest.raises(ValueError, match=r"train.tsv:2: not UTF-8 text"):
        read(tmp_path, "LCQMC")


def test_nested_and_flat_rows_of_one_task_say_the_same() -> None:
    answers = [{"text": "one", "label": 1}, {"text": "two", "label": 0}]
    nested = {"idx": 3, "passage": {"text": "p", "questions": [{"question": "q", "idx": 4, "answers": answers}]}}
    flat = [
        {"paragraph": "p", "question": "q", "answer": answer["text"], "label": answer["label"]}
        | {"idx": {"paragraph": 3, "question": 4, "answer": number}}
        for number, answer in enumerate(answers)
    ]
    expected = [({"passage": "p", "question": "q", "answer": "one"}, 1, "3-4"), (..., 0, "3-4")]
    for form in ([nested], flat):
        examples = read({"train": form}, "MultiRC")
        assert [(example.label, example.group) for example in examples] == [entry[1:] for entry in expected]
        assert examples[0].values == expected[0][0]

    text = "Ada met Bob.\n@highlight\nBob spoke."
    entities = [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 24, "end": 26}]
    queries = [{"query": "@placeholder met Bob", "answers": [{"text": "Ada"}, {"text": "Ada"}]}]
    flat_row = {"passage": text, "query": queries[0]["query"], "entities": ["Ada", "Bob"], "answers": ["Ada"]}
    rows: list[Any] = [{"passage": {"text": text, "entities": entities}, "qas": queries}, flat_row]
    for row in rows:
        (example,) = read({"train": [row]}, "ReCoRD")
        assert example.values["passage"] == "Ada met Bob. Bob spoke."
        assert example.values["entities"] == "Ada, Bob"
        assert example.answers == ("Ada",)

    question = {"question": "who", "answers": [{"text": "Bob"}, {"text": "Bob"}]}
    document = {"data": [{"paragraphs": [{"context": "c", "qas": [question]}]}]}
    rows = [document, {"context": "c", "question": "who", "answers": {"text": ["Bob", "Bob"]}}]
    for row in rows:
        (example,) = read({"train": [row]}, "SQuAD")
        assert (example.values, example.answers) == ({"context": "c", "question": "who"}, ("Bob",))

    target = {"span1_text": "n", "span2_text": "p"}
    rows = [{"text": "t", "target": target, "label": True}, {"text": "t", **target, "label": True}]
    for row in rows:
        (example,) = read({"train": [row]}, "WSC")
        assert example.values == {"text": "t", "noun": "n", "pronoun": "p"}


def test_spellings_of_a_label() -> None:
    rows = [{**GOOD, "label": label} for label in (True, 1, "True", False, 0, "False")]
    assert [example.label for example in read({"train": rows})] == [1, 1, 1, 0, 0, 0]


def test_a_yes_no_word_is_not_an_answer_list() -> None:
    with pytest.raises(ValueError, match="field 'answers' must be a list of texts, but is 'Bob'"):
        read({"train": [{"context": "c", "question": "who", "answers": "Bob"}]}, "SQuAD")


class NamedRows(list[dict[str, Any]]):
    """Rows that say what their class numbers mean, as the Hugging Face library's do."""

    features = MappingProxyType({"label": SimpleNamespace(names=["entailment", "contradiction", "neutral"])})


def test_class_numbers_are_read_by_name() -> None:
    rows = NamedRows({"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1, 2))
    # Ours: contradiction, entailment, neutral.
    assert [example.label for example in read({"train": rows}, "CB")] == [1, 0, 2]
    with pytest.raises(ValueError, match="field 'label' is 0, but must be one of"):
        read({"train": list(rows)}, "CB")


def test_the_hugging_face_library() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=["entailment", "contradiction", "neutral"]),
    )
    columns = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"]}
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({**columns, "label": [0, 1, 2]}, features=features),
        test=datasets.Dataset.from_dict({**columns, "label": [-1] * 3}, features=features),
    )
    assert [example.label for example in read(splits, "CB")] == [1, 0, 2]
    assert [example.label for example in read(splits, "CB", "test")] == [None] * 3
