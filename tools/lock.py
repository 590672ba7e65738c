"""Keeps the committed uv.lock free of download addresses, so that any mirror serves it and none is named.

The committed file holds every version and hash. Each registry is called "default-index", a wheel is known by its file
name and hash, a source archive by its hash and size, and one requirement that no package has makes uv notice that the
file is incomplete: it then resolves again, prefers the versions of the file and writes the addresses into the working
copy. A file that is not written the way uv writes it is an error, never a guess.

A developer once tells git to store the file without addresses, whatever the working copy holds:
    git config filter.uv-lock.clean "python3 tools/lock.py clean"
    git config filter.uv-lock.required true
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from difflib import unified_diff
from pathlib import Path

from lockfile import LockError, differences, is_stripped, parse, strip, without_new_files
from workspace_uv import find_uv, local_index, registry_environment

ROOT = Path(__file__).resolve().parents[1]
UPDATE = "run 'python3 tools/run.py python tools/lock.py update'"


def staged(root: Path) -> str:
    """The content of uv.lock that git would commit now."""
    shown = subprocess.run(["git", "show", ":./uv.lock"], cwd=root, capture_output=True, text=True, check=False)
    if shown.returncode:
        raise LockError(f"git holds no uv.lock in {root}: {shown.stderr.strip()}")
    return shown.stdout


def uv_lock(root: Path, *arguments: str) -> None:
    """Runs `uv lock` against the default index alone, whatever local folders the environment names."""
    uv = find_uv(ROOT)
    if uv is None:
        raise LockError("needs uv: run 'python3 tools/run.py python tools/lock.py ...'")
    local = {"UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_FROZEN", "UV_LOCKED"}
    environment = {name: value for name, value in os.environ.items() if name not in local} | registry_environment()
    done = subprocess.run([uv, "lock", "--no-progress", *arguments], cwd=root, env=environment, check=False)
    if done.returncode:
        raise LockError(f"'uv lock' failed with exit status {done.returncode}")


def update(root: Path, arguments: list[str]) -> None:
    """Locks anew, preferring the versions in the file, and takes the addresses out."""
    uv_lock(root, *arguments)
    lock = root / "uv.lock"
    lock.write_text(strip(lock.read_text()))


def check(root: Path) -> None:
    """Checks that the committed file has no addresses and is what the pyproject files lead to.

    Raises:
        LockError: It is not; the message shows the difference.
    """
    committed = staged(root)
    if not is_stripped(committed):
        raise LockError(f"the uv.lock in git holds addresses: {UPDATE} and commit the file")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in [root / "pyproject.toml", *root.glob("packages/*/pyproject.toml")]:
            target = copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        (copy / "uv.lock").write_text(committed)
        uv_lock(copy)
        fresh = without_new_files(strip((copy / "uv.lock").read_text()), committed)
    if fresh != committed:
        lines = unified_diff(committed.splitlines(), fresh.splitlines(), "committed", "locked anew", lineterm="", n=1)
        diff = "\n".join(list(lines)[:60])
        raise LockError(f"uv.lock is not what the pyproject files lead to: {UPDATE}\n{diff}")


def verify(root: Path) -> None:
    """Checks that the lock which uv just wrote kept every committed version and hash.

    Raises:
        LockError: It did not; the message lists the differences.
    """
    if problems := differences(staged(root), (root / "uv.lock").read_text()):
        raise LockError("uv.lock did not keep what is committed:\n" + "\n".join(problems))


def clean(root: Path, text: str) -> str:
    """What git is to store for a uv.lock with this content: the committed file, if it says the same."""
    if is_stripped(text):
        return text
    try:
        committed = staged(root)
    except LockError:
        return strip(text)
    if local := parse(text).local():
        if problems := differences(committed, text):
            what = f"uv.lock holds wheels of this machine ({', '.join(local)}) and differs from the committed file"
            raise LockError(f"{what}: {UPDATE}\n" + "\n".join(problems))
        return committed
    fresh = strip(text)
    return committed if without_new_files(fresh, committed) == committed else fresh


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("update", help="lock and take the addresses out; further arguments go to 'uv lock'")
    commands.add_parser("check", help="the committed file has no addresses and is what locking gives")
    commands.add_parser("verify", help="the lock that uv just wrote kept every committed version and hash")
    index = commands.add_parser("local-index", help="make an index of local builds; prints its address for UV_INDEX")
    index.add_argument("directory", type=Path)
    commands.add_parser("clean", help="git's clean filter, from standard input to standard output")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "update":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        match options.command:
            case "update":
                update(ROOT, rest)
            case "check":
                check(ROOT)
            case "verify":
                verify(ROOT)
            case "local-index":
                print(local_index(options.directory, staged(ROOT), ROOT / ".uv" / "index"))
            case "clean":
                sys.stdout.write(clean(ROOT, sys.stdin.read()))
    except LockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
