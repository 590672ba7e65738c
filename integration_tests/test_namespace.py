"""`model_center` is a native namespace: a stray __init__.py in one package would hide all the others."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION_OF_PART = {
    "dataset": "mc-data",
    "engine": "mc-layers",
    "layer": "mc-layers",
    "model": "mc-models",
    "recipe": "model-center",
    "tokenizer": "mc-tokenizers",
    "tools": "mc-preprocess",
}


def test_no_package_owns_the_namespace() -> None:
    assert [str(path) for path in ROOT.glob("packages/*/src/model_center/__init__.py")] == []


def test_the_table_names_every_part() -> None:
    parts = {path.name: path.parents[2].name for path in ROOT.glob("packages/*/src/model_center/*") if path.is_dir()}
    parts.pop("__pycache__", None)
    assert parts == DISTRIBUTION_OF_PART


@pytest.mark.parametrize("part", DISTRIBUTION_OF_PART)
def test_a_part_is_typed_and_says_what_it_exports(part: str) -> None:
    module = import_module(f"model_center.{part}")
    assert module.__version__ == version(DISTRIBUTION_OF_PART[part])
    assert module.__file__ is not None
    assert (Path(module.__file__).parent / "py.typed").is_file()
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert missing == []


def test_the_namespace_has_no_file() -> None:
    assert import_module("model_center").__file__ is None
