"""Finds uv, or installs the locked one into the checkout, and tells it what pip knows of this machine."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import quote

from lockfile import LockError, parse

WHEEL_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9_.]+)-(?P<version>[^-]+)(-\d[^-]*)?-(?P<python>[^-]+)-[^-]+-(?P<platform>[^-]+)\.whl"
)


class SetupError(RuntimeError):
    """The environment of the workspace cannot be made on this machine."""


def version_of(uv: Path) -> tuple[int, ...]:
    """The version of a uv; () if it does not run."""
    try:
        shown = subprocess.run([uv, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    numbers = re.match(r"uv (\d+)\.(\d+)\.(\d+)", shown)
    return tuple(map(int, numbers.groups())) if numbers else ()


def locked_uv(root: Path) -> tuple[str, list[str]]:
    """The version of uv that uv.lock names, and the hashes of its wheels."""
    with (root / "uv.lock").open("rb") as file:
        package = next(package for package in tomllib.load(file)["package"] if package["name"] == "uv")
    return package["version"], [wheel["hash"] for wheel in package["wheels"]]


def find_uv(root: Path) -> Path | None:
    """A uv of the checkout, the environment or the PATH: the locked version if it is there, else a recent one."""
    with (root / "pyproject.toml").open("rb") as file:
        required = tomllib.load(file)["tool"]["uv"]["required-version"]
    least = tuple(map(int, required.removeprefix(">=").split(".")))
    locked = tuple(map(int, locked_uv(root)[0].split(".")))
    candidates = [root / ".uv" / "bin" / "uv", Path(sys.executable).parent / "uv", Path(shutil.which("uv") or "uv")]
    versions = {uv: version_of(uv) for uv in candidates if uv.is_file()}
    recent = [uv for uv, version in versions.items() if version >= least]
    return next((uv for uv in recent if versions[uv] == locked), recent[0] if recent else None)


def install_uv(root: Path) -> Path:
    """Installs the uv that uv.lock names, checked against its hashes, into the folder .uv of the checkout.

    Raises:
        SetupError: This Python has no pip, or pip failed.
    """
    version, hashes = locked_uv(root)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--root-user-action=ignore",
    ]
    environment = os.environ | {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"uv=={version} {' '.join(f'--hash={digest}' for digest in hashes)}\n")
        what = ["--upgrade", "--target", str(root / ".uv"), "--requirement", str(requirements)]
        done = subprocess.run([*pip, *what], env=environment, check=False)
    uv = root / ".uv" / "bin" / "uv"
    if done.returncode or not uv.is_file():
        raise SetupError(
            f"'{sys.executable} -m pip' could not install uv {version} (see above): mend that, or put a uv on the PATH"
        )
    return uv


def fits_this_python(wheel: re.Match[str]) -> bool:
    """Whether a wheel can be installed, by its name, for the Python that runs this script."""
    pythons = {"py3", f"cp{sys.version_info.major}{sys.version_info.minor}"}
    system, _, machine = sysconfig.get_platform().partition("-")
    platforms = wheel["platform"].split(".")
    return not pythons.isdisjoint(wheel["python"].split(".")) and any(
        platform == "any" or (system in platform and platform.endswith(f"_{machine}")) for platform in platforms
    )


def local_builds(directory: Path, lock: str) -> Iterator[tuple[str, Path]]:
    """The wheels in a folder that are local builds of locked versions for this Python, each with its package's name."""
    if not directory.is_dir():
        raise LockError(f"no such folder of wheels: {directory}")
    locked = parse(lock).packages
    for path in sorted(directory.glob("*.whl")):
        wheel = WHEEL_NAME.fullmatch(path.name)
        if wheel is None:
            continue  # pip does not see it either
        name = re.sub(r"[-_.]+", "-", wheel["name"]).lower()
        version, _, label = wheel["version"].partition("+")
        if label and (name, version) in locked and fits_this_python(wheel):
            yield name, path.resolve()


def local_index(directory: Path, lock: str, into: Path) -> str:
    """Makes a small package index of the local builds in a folder.

    Args:
        directory: The folder with the wheels.
        lock: The content of the lock file: wheels of other versions are left out.
        into: The folder for the index; what it held goes.

    Returns:
        The index's address for uv's UV_INDEX; empty when no wheel is of use.
    """
    pages: dict[str, str] = {}
    for name, path in local_builds(directory, lock):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        address = f"{path.parent.as_uri()}/{quote(path.name)}#sha256={digest}"
        pages[name] = pages.get(name, "") + f'<a href="{address}">{path.name}</a>\n'
    # An index that is right already stays untouched: another process may be reading it.
    if pages != {path.parent.name: path.read_text() for path in into.glob("*/index.html")}:
        shutil.rmtree(into, ignore_errors=True)
        for name, page in pages.items():
            (into / name).mkdir(parents=True)
            (into / name / "index.html").write_text(page)
    return into.resolve().as_uri() if pages else ""


@cache
def pip_settings() -> dict[str, str]:
    """What this machine's pip is told by its configuration files and by PIP_* variables; empty without pip."""
    # An environment made by uv has no pip of its own, the Python below it has.
    for python in dict.fromkeys((sys.executable, getattr(sys, "_base_executable", sys.executable))):
        command = [python, "-m", "pip", "config", "list"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            return parse_pip_settings(shown.stdout)
    return {}


def parse_pip_settings(listed: str) -> dict[str, str]:
    """Reads what `pip config list` printed: variables win over the section of `install`, that over `global`."""
    found: dict[str, dict[str, str]] = {}
    for line in listed.splitlines():
        if setting := re.fullmatch(r"(:env:|install|global)\.([\w-]+)=('.*'|\".*\")", line):
            found.setdefault(setting[1], {})[setting[2]] = str(ast.literal_eval(setting[3]))
    return found.get("global", {}) | found.get("install", {}) | found.get(":env:", {})


def registry_environment() -> dict[str, str]:
    """The variables that let uv see pip's index and certificates; those that are set already are left out."""
    settings = pip_settings()
    wanted = {"UV_PYTHON_DOWNLOADS": "never"}
    if "index-url" in settings:
        wanted["UV_DEFAULT_INDEX"] = settings["index-url"]
    if "cert" in settings:
        wanted["SSL_CERT_FILE"] = settings["cert"]
    if not {"SSL_CERT_FILE", "SSL_CERT_DIR"}.isdisjoint(wanted.keys() | os.environ.keys()):
        wanted["UV_SYSTEM_CERTS"] = "1"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def uv_environment(root: Path) -> dict[str, str]:
    """Those of `registry_environment`, and one that offers a local build of torch from pip's folders of wheels.

    A local build (for the CPU, say) counts only if it is of the locked version and for the running Python. Where the
    user has no home to write to, uv's cache goes to the checkout.
    """
    environment = registry_environment()
    if not os.access(Path("~").expanduser(), os.W_OK) and {"UV_CACHE_DIR", "XDG_CACHE_HOME"}.isdisjoint(os.environ):
        environment["UV_CACHE_DIR"] = str(root / ".uv" / "cache")
    folders = [Path(entry.removeprefix("file://")) for entry in pip_settings().get("find-links", "").split()]
    lock = (root / "uv.lock").read_text()
    indexes = [
        local_index(folder, lock, root / ".uv" / "index" / str(number))
        for number, folder in enumerate(folder for folder in folders if folder.is_dir())
    ]
    if any(indexes) and "UV_INDEX" not in os.environ:
        environment["UV_INDEX"] = " ".join(index for index in indexes if index)
    return environment
