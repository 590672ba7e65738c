"""The command line: every sub-command once, and how errors look."""

import json
import re
from pathlib import Path

import pytest

from model_center.dataset.indexed import MMapIndexedDataset
from model_center.tools.cli import COMMANDS, main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lord", "##s", "of", "rings", "."]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two texts and a BERT vocabulary."""
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "data_1.txt").write_text("The lords of the rings .\nof the lord\n")
    (tmp_path / "data_2.txt").write_text("rings\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> int:
    return main(command.split())


def sequences(prefix: str) -> list[list[int]]:
    return [item.tolist() for item in MMapIndexedDataset(prefix)]


def test_from_text_to_checked_data_sets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tokenize --input data_1.txt data_2.txt --output out/tok --tokenizer bert --workers 2") == 0
    assert "3 documents, 3 sequences, 14 tokens" in capsys.readouterr().out
    assert sequences("out/tok_1") == [[5, 6, 7, 8, 5, 9, 10, 3], [8, 5, 6, 3]]
    assert sequences("out/tok_2") == [[9, 3]]
    manifest = json.loads((folder / "out/tok_1.manifest.json").read_text())
    assert manifest["provenance"]["tokenizer"]["name"] == "bert"
    assert re.fullmatch("[0-9a-f]{64}", manifest["provenance"]["tokenizer"]["fingerprint"])
    assert run("verify --input out/tok_1.bin out/tok_1.idx out/tok_2 --tokenizer bert") == 0
    assert capsys.readouterr().out == "out/tok_1: no problem found\nout/tok_2: no problem found\n"
    assert run("inspect --input out/tok_1 --tokenizer bert --samples 1 --plot out/lengths.png") == 0
    shown = capsys.readouterr().out
    assert "out/tok_1: 2 documents, 2 sequences, 12 tokens of uint16" in shown
    assert "the lords of the rings" in shown or "of the lord" in shown
    assert (folder / "out/lengths.png").stat().st_size > 1000
    assert run("merge --input out/tok_1 out/tok_2 --output out/all") == 0
    assert sequences("out/all") == sequences("out/tok_1") + sequences("out/tok_2")
    assert run("split --input out/all --output out/part --weights 2 1") == 0
    assert (sequences("out/part_1"), sequences("out/part_2")) == (sequences("out/tok_1"), sequences("out/tok_2"))
    (folder / "out/all.manifest.json").unlink()
    assert run("repair --input out/all") == 0
    assert run("repair --input out/all") == 0
    assert capsys.readouterr().out.endswith("out/all: wrote a manifest\nout/all: nothing to do\n")
    assert run("shuffle --input data_1.txt data_2.txt --output out/lines.txt --seed 3") == 0
    assert len((folder / "out/lines.txt").read_text().splitlines()) == 3


def test_a_configuration_file_gives_any_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "job.yaml").write_text(
        "input: [data_1.txt, data_2.txt]\noutput: tok\ntokenizer: bert\nencoder: cpm1\nlayout: single\n"
    )
    assert run("tokenize --config job.yaml --encoder causal-lm") == 0
    assert len(sequences("tok")) == 3
    assert run("tokenize --config job.yaml --overwrite") == 0
    assert sequences("tok") == []  # no line has 32 tokens
    assert "3 lines gave no sequence" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("tokenize --input absent.txt --output tok --tokenizer bert", 2, "absent.txt: cannot be read"),
        ("tokenize --input data_1.txt --output tok --tokenizer bert --workers 0", 2, "`workers` must be at least 1"),
        ("tokenize --input data_1.txt --output done --tokenizer bert", 2, "done_1 exists; `overwrite` replaces it"),
        ("inspect --input absent", 2, "there is no such index"),
        ("inspect --input a b --plot x.png", 2, "`plot` needs exactly one data set"),
        ("split --input done_1 --output part --weights 0", 2, "`weights` must be"),
        ("merge --input done_1 --output done_1", 2, "exists"),
    ],
)
def test_errors_are_one_line(
    command: str, status: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("tokenize --input data_1.txt --output done --tokenizer bert") == 0
    capsys.readouterr()
    assert run(command) == status
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert message in error[0]


def test_damage_makes_verify_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("tokenize --input data_1.txt --output tok --tokenizer bert")
    content = bytearray((folder / "tok_1.bin").read_bytes())
    content[3] ^= 1
    (folder / "tok_1.bin").write_bytes(content)
    capsys.readouterr()
    assert run("verify --input tok_1 --tokenizer bert") == 1
    problems = capsys.readouterr().out.splitlines()
    assert problems[0] == "tok_1.bin: damaged between bytes 0 and 24"
    assert "holds the id" in problems[1]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_describes_every_option(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name, function in COMMANDS.items():
        if command == [name]:
            assert all(f"--{option}" in text for option in function.__annotations__ if option != "return")
        elif not command:
            assert name in text
