"""The examples of mc-data's README about tasks and the loader give what it shows."""

import doctest
import shutil
from pathlib import Path

import pytest

PACKAGES = Path(__file__).resolve().parents[1] / "packages"


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tiny vocabulary, where the examples ask for a published one.
    shutil.copytree(PACKAGES / "mc-tokenizers" / "tests" / "vocabularies" / "bert", tmp_path / "bert-base-uncased")
    vocabulary = tmp_path / "bert-base-uncased" / "vocab.txt"
    with vocabulary.open("a", encoding="utf-8") as words:
        words.write("fine\nhat\n")
    monkeypatch.chdir(tmp_path)
    readme = PACKAGES / "mc-data" / "README.md"
    result = doctest.testfile(str(readme), module_relative=False, encoding="utf-8", optionflags=doctest.ELLIPSIS)
    assert result.attempted > 25
    assert result.failed == 0
