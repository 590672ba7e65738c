"""Runs a command in the environment of the workspace, and makes that environment first where it is missing or old.

Usage: python3 tools/run.py COMMAND [ARGUMENTS]

    python3 tools/run.py model-center quickstart
    python3 tools/run.py pytest

Needs Python 3.11 or newer with pip, and a package registry. The environment is the folder .venv of the checkout, made
by uv for the Python that runs this script; where no uv is installed, the locked one goes to the folder .uv. Everything
comes in the versions of uv.lock, which stays as it is.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - said in words, before an import fails
    sys.exit(
        "error: ModelCenter needs Python 3.11 or newer, but this is Python "
        + ".".join(map(str, sys.version_info[:3]))
        + ": run 'python3.11 tools/run.py ...' or newer"
    )

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from lockfile import LockError, differences
from workspace_uv import SetupError, find_uv, install_uv, uv_environment

ROOT = Path(__file__).resolve().parents[1]


def fingerprint(root: Path, environment: dict[str, str]) -> str:
    """Changes whenever the environment has to be made again."""
    digest = hashlib.sha256(f"{sys.version_info} {sorted(environment.items())}".encode())
    for path in [root / "uv.lock", root / "pyproject.toml", *sorted(root.glob("packages/*/pyproject.toml"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def synchronise(root: Path, environment: dict[str, str]) -> None:
    """Makes .venv hold the locked versions, and leaves uv.lock as it is although uv writes addresses into it.

    Raises:
        SetupError: uv failed.
        LockError: uv could not keep to uv.lock.
    """
    uv = find_uv(root) or install_uv(root)
    lock = root / "uv.lock"
    before = lock.read_text()
    if "UV_INDEX" not in environment | os.environ:
        print("note: no local build of torch found; the registry's, with CUDA, is several GB", file=sys.stderr)
    command = [uv, "sync", "--python", getattr(sys, "_base_executable", sys.executable)]
    variables = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    try:
        done = subprocess.run(command, cwd=root, env=variables | environment, check=False)
        after = lock.read_text()
    finally:
        lock.write_text(before)
    if done.returncode:
        raise SetupError(f"'uv sync' failed with exit status {done.returncode} (see above)")
    if problems := differences(before, after):
        raise LockError("uv could not keep to uv.lock:\n" + "\n".join(problems))


def prepare(root: Path, environment: dict[str, str]) -> Path:
    """Makes the environment if need be, with these variables for uv; returns its folder of commands."""
    stamp = root / ".venv" / ".synchronised"
    (root / ".uv").mkdir(exist_ok=True)
    with (root / ".uv" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        wanted = fingerprint(root, environment)
        if not stamp.is_file() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            synchronise(root, environment)
            stamp.write_text(wanted)
    return root / ".venv" / "bin"


def main() -> None:
    """Replaces this process by the command."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] in {"-h", "--help"}:
        print(__doc__)
        return
    try:
        for_uv = uv_environment(ROOT)
        commands = prepare(ROOT, for_uv)
    except (SetupError, LockError) as error:
        sys.exit(f"error: {error}")
    path = f"{commands}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    command = shutil.which(sys.argv[1], path=path)
    if command is None:
        sys.exit(f"error: no command '{sys.argv[1]}' in {commands} or on the PATH")
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONHOME", "PYTHONPATH"}}
    environment |= for_uv | {"PATH": path, "VIRTUAL_ENV": str(commands.parent)}
    os.execve(command, [command, *sys.argv[2:]], environment)


if __name__ == "__main__":
    main()
