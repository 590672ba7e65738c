"""What a uv.lock holds: reading it, taking its addresses out, and comparing two of them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

ANY_INDEX = "default-index"
INCOMPLETE = "uv-lock-without-urls"

TOP_KEYS = {"version", "revision", "requires-python", "resolution-markers", "manifest", "package"}
PACKAGE_KEYS = {
    "name",
    "version",
    "source",
    "resolution-markers",
    "dependencies",
    "optional-dependencies",
    "metadata",
    "sdist",
    "wheels",
}
FILE_KEYS = {"url", "path", "filename", "hash", "size", "upload-time"}
HASH = re.compile(r"sha256:[0-9a-f]{64}")

REGISTRY = re.compile(r'\bregistry = "([^"]*)"')
ENTRY = r'url = "(?P<url>[^"]+)", (?P<hash>hash = "[^"]+")(?P<size>, size = \d+)?(, upload-time = "[^"]+")?'
WHEEL = re.compile(rf"^    \{{ {ENTRY} \}},$")
SDIST = re.compile(rf"^sdist = \{{ {ENTRY} \}}$")
REQUIREMENTS = re.compile(r"(?P<start>\[package\.metadata\]\nrequires-dist = \[)(?P<line>\n    )?(?=\{ )")


class LockError(ValueError):
    """The lock file, or what was asked of it, is not as it must be."""


@dataclass(frozen=True)
class Package:
    """One package of a lock file.

    Attributes:
        version: The locked version.
        registry: Where it comes from; None for a member of the workspace.
        hashes: The hashes of its wheels and its source archive.
        needs: The names of the packages that it, or one of its extras, needs.
    """

    version: str
    registry: str | None
    hashes: frozenset[str]
    needs: frozenset[str]

    @property
    def is_local(self) -> bool:
        """Whether it comes from a folder of this machine rather than a server."""
        remote = self.registry is None or self.registry == ANY_INDEX or "://" in self.registry
        return not remote or str(self.registry).startswith("file:")


@dataclass(frozen=True)
class Lock:
    """A lock file.

    Attributes:
        packages: By name and version without its local label, because one name can have several versions.
        roots: The names that the workspace itself asks for: its members and what its dependency groups need.
    """

    packages: Mapping[tuple[str, str], Package]
    roots: frozenset[str]

    def local(self) -> list[str]:
        """The names of the packages that come from a folder of this machine."""
        return sorted(name for (name, _), package in self.packages.items() if package.is_local)


def require(condition: bool, problem: str) -> None:
    """Raises LockError with `problem` unless `condition` holds."""
    if not condition:
        raise LockError(f"uv.lock: {problem}")


def parse(text: str) -> Lock:
    """Reads a lock file's content, with or without addresses.

    Raises:
        LockError: It has a part that this module does not know.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LockError(f"uv.lock is not TOML: {error}") from error
    require(document.get("version") == 1, f"version must be 1, but is {document.get('version')!r}")
    require(document.keys() <= TOP_KEYS, f"unknown tables {sorted(document.keys() - TOP_KEYS)}")
    packages: dict[tuple[str, str], Package] = {}
    roots = {need["name"] for group in document["manifest"].get("dependency-groups", {}).values() for need in group}
    for entry in document.get("package", []):
        name, version = entry.get("name"), entry.get("version")
        require(isinstance(name, str) and isinstance(version, str), f"a package without name or version: {entry}")
        require(entry.keys() <= PACKAGE_KEYS, f"{name} has unknown keys {sorted(entry.keys() - PACKAGE_KEYS)}")
        key = (name, version.partition("+")[0])
        require(key not in packages, f"{name} {version} is there twice")
        packages[key] = Package(version, registry_of(entry), hashes_of(entry), needs_of(entry))
        if packages[key].registry is None:
            roots.add(name)
    require(bool(packages), "holds no package")
    return Lock(packages, frozenset(roots))


def registry_of(entry: Mapping[str, Any]) -> str | None:
    """The registry of a package's entry; None for a member of the workspace."""
    source = entry.get("source")
    if isinstance(source, dict) and source.keys() == {"registry"}:
        return str(source["registry"])
    member = isinstance(source, dict) and source.keys() == {"editable"}
    require(member, f"{entry['name']} must come from a registry or the workspace, but its source is {source!r}")
    return None


def hashes_of(entry: Mapping[str, Any]) -> frozenset[str]:
    """The hashes of the files in a package's entry."""
    name = entry["name"]
    files = [*entry.get("wheels", []), *([entry["sdist"]] if "sdist" in entry else [])]
    for file in files:
        require(file.keys() <= FILE_KEYS, f"{name} has a file with unknown keys: {file}")
        require(HASH.fullmatch(str(file.get("hash"))) is not None, f"{name} has a file without hash: {file}")
    require(bool(files) or "registry" not in entry["source"], f"{name} has neither wheels nor a source archive")
    return frozenset(file["hash"] for file in files)


def needs_of(entry: Mapping[str, Any]) -> frozenset[str]:
    """The names in all dependency lists of a package's entry."""
    lists = [entry.get("dependencies", []), *entry.get("optional-dependencies", {}).values()]
    return frozenset(dependency["name"] for dependencies in lists for dependency in dependencies)


def is_stripped(text: str) -> bool:
    """Whether a lock file's content holds no address and tells uv so."""
    anonymous = all(registry == ANY_INDEX for registry in REGISTRY.findall(text))
    return anonymous and "://" not in text and text.count(INCOMPLETE) == 1


def strip(text: str) -> str:
    """Takes the addresses out of a lock file's content; one without addresses comes back as it is.

    Raises:
        LockError: It is not written the way uv writes it, or holds wheels of a local folder.
    """
    before = parse(text)
    require(not before.local(), f"holds wheels of this machine: {', '.join(before.local())}")
    if is_stripped(text):
        return text
    stripped = "\n".join(strip_line(line) for line in text.split("\n"))
    stripped, count = REQUIREMENTS.subn(with_incomplete, stripped, count=1)
    require(count == 1, "no member of the workspace has requirements")
    require(is_stripped(stripped), "an address is left in a place that this script does not know")
    require(contents(parse(stripped)) == contents(before), "is not written the way uv writes it")
    return stripped


def strip_line(line: str) -> str:
    """Takes the address out of one line."""
    line = REGISTRY.sub(f'registry = "{ANY_INDEX}"', line)
    if wheel := WHEEL.match(line):
        name = unquote(wheel["url"].rpartition("/")[2])
        require(name.endswith(".whl"), f"not a wheel: {line.strip()}")
        return f'    {{ filename = "{name}", {wheel["hash"]} }},'
    if sdist := SDIST.match(line):
        return f"sdist = {{ {sdist['hash']}{sdist['size'] or ''} }}"
    require("://" not in line, f"an address in an unknown place: {line.strip()}")
    return line


def with_incomplete(requirements: re.Match[str]) -> str:
    """Puts a requirement that no pyproject has at the head of a list of requirements."""
    start, line = requirements["start"], requirements["line"] or ""
    return f'{start}{line}{{ name = "{INCOMPLETE}" }},{line or " "}'


def contents(lock: Lock) -> dict[tuple[str, str], tuple[object, ...]]:
    """What must stay the same while addresses come and go."""
    return {key: (package.version, package.hashes, package.needs) for key, package in lock.packages.items()}


def without_new_files(stripped: str, committed: str) -> str:
    """Drops the files that a registry added to a locked version since the committed content was written."""
    known = set(HASH.findall(committed))
    return "".join(
        line
        for line in stripped.splitlines(keepends=True)
        if not line.startswith(("    { filename = ", "sdist = ")) or set(HASH.findall(line)) <= known
    )


def differences(committed: str, written: str) -> list[str]:
    """What a lock that uv wrote from the committed one did not keep.

    Files that a registry added to a version are no difference. Neither is a local build of a locked version (the CPU
    build of torch), nor that packages which only the ordinary build needs (the CUDA ones) are gone with it.

    Args:
        committed: The content of the file in git.
        written: The content of the file that uv wrote.

    Returns:
        One line for each difference.
    """
    old, new = parse(committed), parse(written)
    still_needed = reachable(old, new)
    problems = [f"{name} {version} is new" for name, version in sorted(new.packages.keys() - old.packages.keys())]
    for (name, version), package in sorted(old.packages.items()):
        now = new.packages.get((name, version))
        if now is None:
            if name in still_needed:
                problems.append(f"{name} {version} is gone")
        elif not now.is_local and not package.hashes <= now.hashes:
            problems.append(f"{name} {version} lost {', '.join(sorted(package.hashes - now.hashes))}")
    return problems


def reachable(old: Lock, new: Lock) -> set[str]:
    """The names that the old lock needs when the new lock's local builds stand in for the ordinary ones."""
    local = set(new.local())
    needs: dict[str, frozenset[str]] = {}
    for lock, stands_in in ((old, False), (new, True)):
        for (name, _), package in lock.packages.items():
            if (name in local) == stands_in:
                needs[name] = needs.get(name, frozenset()) | package.needs
    found: set[str] = set()
    waiting = list(old.roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(needs.get(name, ()))
    return found
