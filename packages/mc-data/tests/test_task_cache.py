"""Tokenized rows on disk: found again, told apart, rebuilt when damaged."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_tokenizer import PlainTokenizer, ToyTokenizer, write_rows

from model_center.dataset import bertdataset, gpt2dataset, t5dataset
from model_center.dataset.tasks.cache import Stored, cache_folder, cached
from model_center.dataset.tasks.columns import Ragged

ROWS = [{"passage": f"p{n} and more", "question": f"q{n}", "label": n % 2 == 0} for n in range(5)]


class CountingTokenizer(ToyTokenizer):
    calls = 0

    def __call__(self, *texts: Any, **options: Any) -> dict[str, Any]:
        CountingTokenizer.calls += isinstance(texts[0], list)
        return super().__call__(*texts, **options)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    CountingTokenizer.calls = 0
    return write_rows(tmp_path, "BoolQ", "train.jsonl", "\n".join(map(json.dumps, ROWS)))


def items(dataset: Any) -> list[dict[str, Any]]:
    return [{name: value.tolist() for name, value in dataset[index].items()} for index in range(len(dataset))]


@pytest.mark.parametrize("family", [bertdataset, gpt2dataset, t5dataset])
def test_a_second_time_needs_no_tokenizer(data: Path, family: Any) -> None:
    folder = data / "cache"
    built, loaded = (
        items(family.DATASET["BoolQ"](data, "train", 0, 1, CountingTokenizer(), cache=folder)) for _ in range(2)
    )
    first = CountingTokenizer.calls
    assert first > 0
    assert built == loaded
    family.DATASET["BoolQ"](data, "train", 0, 1, CountingTokenizer())
    assert CountingTokenizer.calls == 2 * first
    assert [file.suffix for file in folder.iterdir()] == [".rows"]


def test_answers_and_groups_are_kept(data: Path) -> None:
    question = {"question": "q", "idx": 4, "answers": [{"text": "a", "label": 1}]}
    write_rows(
        data, "MultiRC", "train.jsonl", json.dumps({"idx": 3, "passage": {"text": "p", "questions": [question]}})
    )
    document = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "é"}]}]}]}]}
    write_rows(data, "SQuAD", "train-v1.1.json", json.dumps(document))
    for _ in range(2):
        assert t5dataset.DATASET["MultiRC"](data, "train", 0, 1, ToyTokenizer(), cache=data / "c").groups == ["3-4"]
        assert t5dataset.DATASET["SQuAD"](data, "train", 0, 1, ToyTokenizer(), cache=data / "c").answers == [["é"]]


def test_whatever_changes_the_result_gives_another_file(data: Path) -> None:
    folder = data / "cache"

    def files(family: Any = bertdataset, name: str = "BoolQ", tokenizer: Any = None, length: int = 20) -> int:
        family.DATASET[name](data, "train", 0, 1, tokenizer or ToyTokenizer(), length, cache=folder)
        return len(list(folder.iterdir()))

    assert [files(), files(length=21), files(gpt2dataset)] == [1, 2, 3]
    other = ToyTokenizer()
    other.fingerprint = "other"
    assert files(tokenizer=other) == 4
    write_rows(data, "BoolQ", "train.jsonl", "\n".join(map(json.dumps, ROWS[1:])))
    assert files() == 5
    assert files() == 5


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_file_is_made_anew(data: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = data / "cache"
    good = items(bertdataset.DATASET["BoolQ"](data, "train", 0, 1, ToyTokenizer(), cache=folder))
    (file,) = folder.iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        {
            "cut": content[:middle],
            "flip": content[:300] + bytes([content[300] ^ 1]) + content[301:],
            "empty": b"",
            "foreign": b"PK\x05\x06" + bytes(18),
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        again = items(bertdataset.DATASET["BoolQ"](data, "train", 0, 1, ToyTokenizer(), cache=folder))
    assert again == good
    assert f"{file} is made anew: it is damaged" in caplog.text
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_only_warns(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = data / "file"
    blocked.write_text("")
    assert len(bertdataset.DATASET["BoolQ"](data, "train", 0, 1, ToyTokenizer(), cache=blocked)) == 5
    assert "could not be cached" in caplog.text


def test_where_files_go(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_CENTER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "xdg"))
    assert "model_center" in cache_folder().parts
    monkeypatch.setenv("MODEL_CENTER_CACHE", str(data / "mine"))
    bertdataset.DATASET["BoolQ"](data, "train", 0, 1, ToyTokenizer(), cache=True)
    assert len(list((data / "mine").iterdir())) == 1
    monkeypatch.setattr(ToyTokenizer, "fingerprint", None)
    bertdataset.DATASET["BoolQ"](data, "train", 0, 1, ToyTokenizer())
    monkeypatch.setattr(ToyTokenizer, "is_fast", False)
    with pytest.raises(ValueError, match="`cache` needs to know which ids a tokenizer gives: tokenizer 'toy' has no"):
        gpt2dataset.DATASET["BoolQ"](data, "train", 0, 1, ToyTokenizer(), cache=True)
    assert PlainTokenizer.fingerprint == "toy"


def test_no_damaged_byte_goes_unnoticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = Stored({"ids": Ragged.of([[1, 2], [3]]), "labels": np.array([0, 1])}, [["a"], []], ["g", "h"])
    cached(tmp_path, "identity", PlainTokenizer(), lambda: built)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()

    def same(stored: Stored) -> bool:
        ids = stored.columns["ids"]
        assert isinstance(ids, Ragged)
        return (
            list(stored.columns) == ["ids", "labels"]
            and [ids[0].tolist(), ids[1].tolist()] == [[1, 2], [3]]
            and np.asarray(stored.columns["labels"]).tolist() == [0, 1]
            and (stored.answers, stored.groups) == (built.answers, built.groups)
        )

    caplog.set_level(logging.ERROR)
    rebuilt = []

    def rebuild() -> Stored:
        rebuilt.append(True)
        return built

    for position in range(0, len(content), 3):
        file.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        assert same(cached(tmp_path, "identity", PlainTokenizer(), rebuild)), position
    assert len(rebuilt) == len(range(0, len(content), 3))
