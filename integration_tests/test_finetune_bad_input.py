"""Wrong input to `model-center finetune`: one clear message, exit code 2, and nothing written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_encoder import SPECIAL, WORDS, write_encoder, write_task

from model_center.recipe.cli import main
from model_center.tokenizer import BertTokenizer

Mangle = Callable[[Path], list[str] | None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_encoder(folder / "model")
    write_task(folder / "data", train=8, dev=4)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_line(folder: Path, split: str, number: int, text: str) -> None:
    file = folder / "data" / "BoolQ" / f"{split}.jsonl"
    lines = file.read_text().splitlines()
    lines[number - 1] = text
    file.write_text("\n".join(lines) + "\n")


def without(folder: Path, field: str) -> str:
    row = json.loads((folder / "data" / "BoolQ" / "train.jsonl").read_text().splitlines()[2])
    del row[field]
    return json.dumps(row)


def unlabelled_dev(folder: Path) -> None:
    file = folder / "data" / "BoolQ" / "val.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "label": None}) + "\n" for row in rows))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def overwrite(file: Path) -> None:
    file.write_text("hello")


def larger_tokenizer(folder: Path) -> list[str]:
    directory = folder / "tokenizer"
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS, "more", "words"]) + "\n")
    BertTokenizer.from_pretrained(directory).save_pretrained(directory)
    return ["--model.tokenizer", str(directory)]


BAD: dict[str, tuple[Mangle, str]] = {
    "misspelt identifier": (
        lambda _: ["--model.name", "bert-base-uncasd"],
        r"'bert-base-uncasd' is neither a directory nor a known identifier; did you mean.* bert-base-uncased",
    ),
    "missing directory": (lambda _: ["--model.name", "./no/such/model"], r"no/such/model"),
    "no weights": (lambda folder: (folder / "model" / "model.safetensors").unlink(), r"model holds no weights"),
    "truncated weights": (
        lambda folder: truncate(folder / "model" / "model.safetensors"),
        r"model\.safetensors is not a complete safetensors file",
    ),
    "foreign weights": (
        lambda folder: overwrite(folder / "model" / "model.safetensors"),
        r"model\.safetensors is not a complete safetensors file",
    ),
    "no tokenizer": (
        lambda folder: (folder / "model" / "tokenizer.json").unlink(),
        r"model.*tokenizer",
    ),
    "unknown key": (lambda folder: edit_config(folder, dim_modl=3), r"no option `dim_modl`.*`dim_model`"),
    "other sizes": (lambda folder: edit_config(folder, dim_ff=33), r"of the wrong shape.*w_in.*must be \(33, 16\)"),
    "heads do not divide": (lambda folder: edit_config(folder, num_heads=3, num_heads_kv=2), r"`num_heads`"),
    "newer format": (lambda folder: edit_config(folder, format_version=99), r"`format_version` .*99"),
    "unknown family": (lambda folder: edit_config(folder, model_type="bort"), r"`model_type` .*'bort'"),
    "unknown family option": (lambda _: ["--model.family", "bort"], r"model\.family must be one of .*bert.*'bort'"),
    "wrong task": (lambda _: ["--data.task", "BoolK"], r"no task 'BoolK'.*BoolQ, CB, COPA"),
    "task without classes": (lambda _: ["--data.task", "SQuAD"], r"SQuAD"),
    "no data folder": (lambda _: ["--data.path", "./nowhere"], r"there is no folder .*nowhere.BoolQ"),
    "no training split": (
        lambda folder: (folder / "data" / "BoolQ" / "train.jsonl").unlink(),
        r"no split 'train' of BoolQ.*its folder holds val\.jsonl",
    ),
    "broken line": (lambda folder: edit_line(folder, "train", 3, '{"passage": '), r"train\.jsonl:3: not valid JSON"),
    "line lacks a field": (
        lambda folder: edit_line(folder, "train", 3, without(folder, "question")),
        r"train\.jsonl:3: field 'question' is missing",
    ),
    "line lacks a label": (
        lambda folder: edit_line(folder, "train", 3, without(folder, "label")),
        r"train\.jsonl:3: field 'label' is missing",
    ),
    "wrong label": (
        lambda folder: edit_line(folder, "val", 2, json.dumps({"passage": "a", "question": "b", "label": "maybe"})),
        r"val\.jsonl:2: field 'label' is 'maybe'",
    ),
    "no labels": (unlabelled_dev, r"val\.jsonl:1: field 'label' is missing"),
    "vocabulary too small": (larger_tokenizer, r"tokenizer 'tokenizer' has 19 tokens, but .* vocabulary of only 17"),
    "too long": (
        lambda _: ["--data.max_length", "33"],
        r"data\.max_length must be at most the model's position_size 32, but is 33",
    ),
    "no room for the question": (lambda _: ["--data.max_length", "5"], r"train\.jsonl:1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mangle, message = BAD[name]
    folder = tmp_path / "inputs"
    shutil.copytree(whole, folder)
    options = mangle(folder) or []
    given = ["--model.name", str(folder / "model"), "--data.path", str(folder / "data"), "--data.max_length", "32"]
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *given, "--output", str(tmp_path / "run"), *options])
    captured = capfd.readouterr()
    assert stopped.value.code == 2
    assert "Traceback" not in captured.err
    assert captured.err.count("error:") == 1
    assert re.search("^model-center finetune: error: .*" + message, captured.err, re.DOTALL), captured.err
    assert not (tmp_path / "run").exists()


def test_an_output_that_holds_something(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    given = ["--model.name", str(whole / "model"), "--data.path", str(whole / "data"), "--output", str(tmp_path)]
    for options, message in (([], "is not empty; give another one"), (["--overwrite"], "no run directory")):
        with pytest.raises(SystemExit) as stopped:
            main(["finetune", *given, *options])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
