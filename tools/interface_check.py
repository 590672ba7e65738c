"""Compares the public interface of all packages with the last recorded release.

Usage: python tools/interface_check.py check | record | show

The interface is what the parts' `__all__` offer: functions and classes, their public methods, and the names, kinds and
defaults of parameters; likewise of every module inside a part that has an `__all__` or is named in one. `record` writes
it to tools/interface, one stub for each module, when a release is made. A change that breaks callers needs a higher
major version (below 1.0: minor), and a line in the package's CHANGELOG.md, under the heading of that version, that
names what changed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "model_center"
OPERATIONS = {f"__{name}__" for name in ("call", "contains", "enter", "exit", "getitem", "init", "iter", "len", "next")}


def interface(root: Path) -> dict[str, dict[str, str]]:
    """The stubs of every public module, by distribution and module.

    Raises:
        ValueError: An `__all__` lists a name that its module does not have.
    """
    sources = sorted(root.glob("packages/*/src"))
    loader = griffe.GriffeLoader(search_paths=sources, allow_inspection=False)
    loader.load(NAMESPACE)
    loader.resolve_aliases(implicit=True, external=False)
    namespace = loader.modules_collection[NAMESPACE]
    return {
        source.parent.name: {
            module.path: stub(module)
            for path in sorted((source / NAMESPACE).iterdir())
            if (path / "__init__.py").is_file()
            for module in public_modules(namespace[path.name])
        }
        for source in sources
    }


def public_modules(part: griffe.Module) -> Iterator[griffe.Module]:
    """A part, and the modules in it that have an `__all__` or are named in one."""
    yield part
    for name, member in sorted(part.modules.items()):
        if not member.is_alias and not name.startswith("_") and (name in (part.exports or ()) or member.exports):
            yield from public_modules(member)


def stub(module: griffe.Module) -> str:
    """The interface of one module as a stub."""
    names = module.exports if module.exports is not None else [name for name in module.members if is_own(module, name)]
    blocks = []
    for name in sorted(map(str, names)):
        if name not in module.members:
            raise ValueError(f"{module.path}.__all__ lists {name!r}, which the module does not have")
        member = resolved(module.members[name])
        if not name.startswith("_") and not (member is not None and member.is_module):
            blocks.append(render(name, member))
    return "\n".join(blocks) + "\n"


def is_own(module: griffe.Module, name: str) -> bool:
    """Whether a module without an `__all__` defines this name itself."""
    return not module.members[name].is_alias and not name.startswith("_")


def resolved(member: griffe.Object | griffe.Alias) -> griffe.Object | None:
    """What a name stands for; None if that is in another project."""
    if not isinstance(member, griffe.Alias):
        return member
    try:
        return member.final_target
    except griffe.AliasResolutionError:
        return None


def render(name: str, member: griffe.Object | None) -> str:
    """One name of the interface."""
    if isinstance(member, griffe.Function):
        return render_function(name, member)
    if not isinstance(member, griffe.Class):
        return f"{name}: object"
    lines = [f"class {name}:"]
    for inner, alias in sorted(member.all_members.items()):
        target = resolved(alias)
        hidden = inner.startswith("_") and inner not in OPERATIONS
        if hidden or target is None or target.labels == {"instance-attribute"}:
            continue
        lines += [f"    {line}" for line in render(inner, target).splitlines()]
    return "\n".join([*lines, "    ..."] if len(lines) == 1 else lines)


def render_function(name: str, function: griffe.Function) -> str:
    """The signature of a function without annotations."""
    decorators = "".join(f"@{label}\n" for label in ("classmethod", "staticmethod") if label in function.labels)
    kinds = [parameter.kind for parameter in function.parameters]
    parameters = [render_parameter(parameter) for parameter in function.parameters]
    if griffe.ParameterKind.keyword_only in kinds and griffe.ParameterKind.var_positional not in kinds:
        parameters.insert(kinds.index(griffe.ParameterKind.keyword_only), "*")
    if positional_only := kinds.count(griffe.ParameterKind.positional_only):
        parameters.insert(positional_only, "/")
    return f"{decorators}def {name}({', '.join(parameters)}): ..."


def render_parameter(parameter: griffe.Parameter) -> str:
    """A parameter's name with its stars or its default."""
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    if parameter.kind in stars:
        return f"{stars[parameter.kind]}{parameter.name}"
    return parameter.name if parameter.default is None else f"{parameter.name}={parameter.default}"


def recorded(root: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """The version and the stubs of the last recorded release of each distribution."""
    releases: dict[str, tuple[str, dict[str, str]]] = {}
    for path in sorted((root / "tools" / "interface").glob("*.pyi")):
        header, _, text = path.read_text().partition("\n")
        found = re.fullmatch(r"# (\S+) (\d+\.\d+\.\d+)", header)
        if found is None:
            raise ValueError(f"{path} must begin with '# distribution version', but begins with {header!r}")
        releases.setdefault(found[1], (found[2], {}))[1][path.stem] = text
    return releases


def breakages(module: str, old: str, new: str) -> Iterator[tuple[str, str]]:
    """What in a module breaks its callers: the name to be found in the changelog, and what happened."""
    before, after = (griffe.visit(module, Path(f"{module}.pyi"), text) for text in (old, new))
    for breakage in griffe.find_breaking_changes(before, after):
        named = breakage.obj if not breakage.obj.name.startswith("__") else breakage.obj.parent
        coloured = breakage.explain(griffe.ExplanationStyle.ONE_LINE)
        what = re.sub(r"\x1b\[\d+m", "", coloured).partition(": ")[2]
        yield getattr(named, "name", module), f"{module}.{what}"


def version_of(root: Path, distribution: str) -> str:
    """The version in a package's pyproject.toml."""
    with (root / "packages" / distribution / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def may_break(old: str, new: str) -> bool:
    """Whether the step from one version to another allows a change that breaks callers."""
    before, after = (tuple(map(int, version.split("."))) for version in (old, new))
    return after[0] > before[0] or (before[0] == after[0] == 0 and after[1] > before[1])


def changelog_section(root: Path, distribution: str, version: str) -> str:
    """What a package's changelog says of one version."""
    path = root / "packages" / distribution / "CHANGELOG.md"
    text = path.read_text() if path.is_file() else ""
    found = re.search(rf"^## {re.escape(version)}\b.*?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def check(root: Path) -> list[str]:
    """One line for each break of a recorded interface that its version or its changelog does not own up to."""
    now = interface(root)
    problems = []
    for distribution, (old_version, modules) in recorded(root).items():
        version = version_of(root, distribution)
        section = changelog_section(root, distribution, version)
        for module, old in modules.items():
            new = now.get(distribution, {}).get(module)
            removed = [(module.rpartition(".")[2], f"{module}: Public module was removed")]
            for name, what in removed if new is None else breakages(module, old, new):
                if not may_break(old_version, version):
                    problems.append(f"{what} since {distribution} {old_version}, but the version is {version}")
                elif name not in section:
                    problems.append(f"{what}, but CHANGELOG.md of {distribution} {version} does not mention '{name}'")
    return problems


def record(root: Path) -> None:
    """Writes the interface as it is now as that of the last release."""
    folder = root / "tools" / "interface"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.pyi"):
        path.unlink()
    for distribution, modules in interface(root).items():
        for module, text in modules.items():
            (folder / f"{module}.pyi").write_text(f"# {distribution} {version_of(root, distribution)}\n{text}")


def main() -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "record", "show"])
    command = parser.parse_args().command
    if command == "record":
        record(ROOT)
    elif command == "show":
        for modules in interface(ROOT).values():
            for module, text in modules.items():
                print(f"# {module}\n{text}")
    elif problems := check(ROOT):
        print("\n".join(problems), file=sys.stderr)
        return 1
    else:
        print(f"No break of the recorded interfaces ({len(recorded(ROOT))} packages have a recorded release).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
