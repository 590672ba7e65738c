"""The README's examples run, in order, as they stand; its new family passes the tests of every family."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_model_huggingface as parity
import tiny_families
import torch

from model_center.engine import TorchEngine, use_engine
from model_center.model import families

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[int, str]]:
    """The code blocks of a language, with the line before each."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    return [(TEXT[: block.start(1)].count("\n"), block[1]) for block in found]


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module whose code runs on the CPU, and whose engine ends with it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their types up there
    with use_engine(TorchEngine(torch.device("cpu"))):
        yield module


def run(module: ModuleType, code: str, line: int) -> None:
    exec(compile("\n" * line + code, str(README), "exec"), vars(module))


def test_examples(readme: ModuleType) -> None:
    examples = blocks("python")
    assert len(examples) >= 8
    for line, code in examples:
        run(readme, code, line)


USE = """
import sys
from model_center.model import families, load_model
model = load_model(sys.argv[1])
assert type(model) is families["gpt_bigcode"]
assert type(model).__module__ == "model_center.model.gpt_bigcode"
"""


def test_new_family_is_one_file_one_line_and_one_row(
    readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, file = next((line, code) for line, code in blocks("python") if "class GPTBigCode(" in code)
    assert len(file.splitlines()) < 100
    run(readme, file, line)
    registration, row = (code for _, code in blocks("text"))

    # The row, through the tests of every family.
    model: Any = vars(readme)["GPTBigCode"]
    monkeypatch.setitem(families, model.config_class.model_type, model)
    family: Any = eval(row.strip().removesuffix(","), vars(tiny_families))
    for number, padding in enumerate(["right", "left"]):
        parity.test_logits_and_hidden_states(family, padding, tmp_path / f"logits{number}")
        parity.test_attentions(family, padding, tmp_path / f"attentions{number}")
        parity.test_cache_continues_as_the_full_pass(family, padding, tmp_path / f"cache{number}")
    parity.test_gradients_of_every_parameter(family, tmp_path / "gradients")
    parity.test_embeddings_in_place_of_ids(family, tmp_path / "embeddings")
    parity.test_exported_directory_gives_the_same_logits(family, tmp_path / "export")

    # The file and the line, in a copy of the package.
    package = tmp_path / "src" / "model_center" / "model"
    shutil.copytree(README.parent / "src" / "model_center" / "model", package)
    (package / "gpt_bigcode.py").write_text(file, encoding="utf-8")
    registry = (package / "families.py").read_text(encoding="utf-8")
    (package / "families.py").write_text(
        registry.replace("_MODELS = (\n", f"_MODELS = (\n{registration}"), encoding="utf-8"
    )
    command = [sys.executable, "-c", USE, str(tmp_path / "export" / "exported")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "src")})


def test_identifiers_are_those_of_the_code() -> None:
    table = TEXT[TEXT.index("| class |") : TEXT.index("Every model takes")]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", table, re.MULTILINE)
    written = {name: re.findall(r"`([\w-]+)`", identifiers) for name, identifiers in rows}
    assert written == {model.__name__: list(model.config_class.published) for model in families.values()}


def test_install_commands_need_no_published_package() -> None:
    for command in re.findall(r"pip install (.*?)[`\n]", TEXT):
        assert all(part.startswith("./") or part.endswith(".whl") for part in command.split())
