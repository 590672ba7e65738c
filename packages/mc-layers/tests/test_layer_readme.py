"""The README's examples run, in order, as they stand."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from model_center.engine import TorchEngine, use_engine

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def _own_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples run on the CPU, and what their `init_distributed` sets up ends with them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with use_engine(TorchEngine(torch.device("cpu"))):
        yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("_own_engine")
def test_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    examples = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(examples) >= 8
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their types up there
    for example in examples:
        line = text[: example.start(1)].count("\n")
        exec(compile("\n" * line + example[1], str(README), "exec"), vars(module))


def test_install_commands_need_no_published_package() -> None:
    for command in re.findall(r"pip install (.*?)[`\n]", README.read_text(encoding="utf-8")):
        assert command.startswith("./") or command.endswith(".whl")
