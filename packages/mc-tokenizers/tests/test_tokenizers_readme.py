"""The README's examples give what it shows."""

import doctest
from pathlib import Path

import pytest


def test_examples(vocabularies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vocabularies)
    readme = Path(__file__).resolve().parents[1] / "README.md"
    result = doctest.testfile(str(readme), module_relative=False, encoding="utf-8", optionflags=doctest.ELLIPSIS)
    assert result.attempted > 12
    assert result.failed == 0
