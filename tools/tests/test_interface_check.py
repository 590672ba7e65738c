"""The check of the public interface: what breaks callers is found, what does not is let through."""

from pathlib import Path

import pytest
from interface_check import check, interface, main, may_break, record

SOURCE = '''\
"""A part."""

from model_center.part.inner import helper, Options
from model_center.part import extra

__version__ = "0.1.0"
__all__ = ["Model", "extra", "helper", "later", "size", "__version__"]

def size(width, height=2, /, depth=3, *rest, unit="cm", **more): ...

class Base:
    def train(self, rate=0.1): ...

class Model(Base):
    def __init__(self, layers, *, heads=8):
        self.layers = layers

    @property
    def device(self): ...

    @classmethod
    def load(cls, path, strict=True): ...

    def _private(self, anything): ...

def later(a, b=None): ...

def internal(): ...
'''
INNER = '''\
"""Not public: nothing names it, and it has no `__all__`."""

from dataclasses import dataclass, field

@dataclass(kw_only=True)
class Options:
    depth: int = 2
    names: list = field(default_factory=list)

def helper(text: str, *, flag: bool = False) -> int: ...
'''
EXTRA = '''\
"""Public, because the part's `__all__` names it."""

from dataclasses import dataclass

from model_center.part.inner import Options

@dataclass
class Layer(Options):
    width: int
    bias: bool = True
'''
INTERFACE = """\
class Model:
    def __init__(self, layers, *, heads=8): ...
    device: object
    @classmethod
    def load(cls, path, strict=True): ...
    def train(self, rate=0.1): ...
def helper(text, *, flag=False): ...
def later(a, b=None): ...
def size(width, height=2, /, depth=3, *rest, unit='cm', **more): ...
"""


class Workspace:
    """One package with one part."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.part = root / "packages" / "mc-part" / "src" / "model_center" / "part"
        self.part.mkdir(parents=True)
        (root / "tools").mkdir()
        self.release("0.1.0")
        self.write("__init__.py", SOURCE)
        self.write("inner.py", INNER)
        self.write("extra.py", EXTRA)

    def write(self, name: str, text: str) -> None:
        (self.part / name).write_text(text)

    def change(self, name: str, old: str, new: str) -> None:
        text = (self.part / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def release(self, version: str, changelog: str = "") -> None:
        package = self.root / "packages" / "mc-part"
        (package / "pyproject.toml").write_text(f'[project]\nname = "mc-part"\nversion = "{version}"\n')
        (package / "CHANGELOG.md").write_text(f"# Changes\n\n{changelog}\n## 0.1.0\n\nFirst: size, Model, all.\n")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace whose release 0.1.0 is recorded."""
    made = Workspace(tmp_path)
    record(made.root)
    return made


def test_the_interface_is_what_all_offers(workspace: Workspace) -> None:
    assert interface(workspace.root) == {
        "mc-part": {
            "model_center.part": INTERFACE,
            "model_center.part.extra": (
                "class Layer:\n    def __init__(self, width, bias=True, *, depth=2, names=list()): ...\n"
                "    bias: object\n    depth: object\n    names: object\n"
            ),
        }
    }
    recorded = (workspace.root / "tools" / "interface" / "model_center.part.pyi").read_text()
    assert recorded == f"# mc-part 0.1.0\n{INTERFACE}"


def test_an_unchanged_interface_passes(workspace: Workspace) -> None:
    assert check(workspace.root) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("__init__.py", '"later", ', "", "model_center.part.later: Public object was removed"),
        ("__init__.py", "(a, b=None)", "(a, c=None)", "model_center.part.later(b): Parameter was removed"),
        ("__init__.py", "heads=8", "heads=16", "Model.__init__(heads): Parameter default was changed: 8 -> 16"),
        ("__init__.py", "strict=True", "strict", "Model.load(strict): Parameter is now required"),
        ("__init__.py", "(a, b=None)", "(b=None, a=1)", "model_center.part.later(a): Positional parameter was moved"),
        ("__init__.py", "(a, b=None)", "(a, b=None, *, c)", "later(c): Parameter was added as required"),
        ("__init__.py", "rate=0.1", "*, rate=0.1", "Model.train(rate): Parameter kind was changed"),
        ("__init__.py", "def train", "def _train", "Model.train: Public object was removed"),
        ("__init__.py", "class Model(Base)", "class Model", "Model.train: Public object was removed"),
        ("inner.py", "flag", "switch", "model_center.part.helper(flag): Parameter was removed"),
        (
            "inner.py",
            "depth: int = 2",
            "depth: int = 3",
            "Layer.__init__(depth): Parameter default was changed: 2 -> 3",
        ),
        ("__init__.py", '"extra", ', "", "model_center.part.extra: Public module was removed"),
    ],
)
def test_a_break_is_found(workspace: Workspace, file: str, old: str, new: str, problem: str) -> None:
    workspace.change(file, old, new)
    found = check(workspace.root)
    assert problem in found[0]
    assert all(line.endswith("since mc-part 0.1.0, but the version is 0.1.0") for line in found)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("__init__.py", '"later", ', '"later", "internal", '),
        ("__init__.py", "(a, b=None)", "(a: int, b: str | None = None, *, c=3)"),
        ("__init__.py", "def internal(): ...", ""),
        ("__init__.py", "self, anything", "self"),
        ("__init__.py", "self.layers", "self.blocks"),
        ("inner.py", "-> int: ...", "-> str: return text"),
    ],
)
def test_what_breaks_nobody_passes(workspace: Workspace, file: str, old: str, new: str) -> None:
    workspace.change(file, old, new)
    assert check(workspace.root) == []


def test_a_break_needs_a_version_and_a_line_in_the_changelog(workspace: Workspace) -> None:
    workspace.change("__init__.py", '"later", ', "")
    workspace.release("0.1.1", "## 0.1.1\n\n- later is gone.\n")
    assert check(workspace.root) == [
        "model_center.part.later: Public object was removed since mc-part 0.1.0, but the version is 0.1.1"
    ]
    workspace.release("0.2.0", "## 0.2.0\n\n- Something is gone.\n")
    assert check(workspace.root) == [
        "model_center.part.later: Public object was removed, but CHANGELOG.md of mc-part 0.2.0 does not mention 'later'"
    ]
    workspace.release("0.2.0", "## 0.2.0 (2026-12-01)\n\n- `later` is gone.\n")
    assert check(workspace.root) == []


def test_recording_a_release_makes_it_the_one_to_compare_with(workspace: Workspace) -> None:
    workspace.change("__init__.py", '"later", ', "")
    workspace.change("__init__.py", '"extra", ', "")
    workspace.release("0.2.0")
    record(workspace.root)
    assert check(workspace.root) == []
    assert [path.name for path in (workspace.root / "tools" / "interface").iterdir()] == ["model_center.part.pyi"]


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        ("0.1.0", "0.1.9", False),
        ("0.1.0", "0.2.0", True),
        ("0.9.0", "1.0.0", True),
        ("1.2.0", "1.10.0", False),
        ("1.2.0", "2.0.0", True),
        ("0.2.0", "0.1.0", False),
    ],
)
def test_which_versions_may_break(old: str, new: str, allowed: bool) -> None:
    assert may_break(old, new) is allowed


def test_a_name_in_all_that_is_not_there_is_an_error(workspace: Workspace) -> None:
    workspace.change("__init__.py", "def later", "def sooner")
    with pytest.raises(ValueError, match=r"model_center\.part\.__all__ lists 'later', which the module does not have"):
        check(workspace.root)


def test_a_record_without_its_heading_is_an_error(workspace: Workspace) -> None:
    (workspace.root / "tools" / "interface" / "model_center.part.pyi").write_text(INTERFACE)
    with pytest.raises(ValueError, match="must begin with '# distribution version'"):
        check(workspace.root)


def test_the_command_lists_every_break(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("interface_check.ROOT", workspace.root)
    monkeypatch.setattr("sys.argv", ["interface_check.py", "check"])
    assert main() == 0
    workspace.change("__init__.py", "heads=8", "heads=16")
    workspace.change("inner.py", "flag", "switch")
    assert main() == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
