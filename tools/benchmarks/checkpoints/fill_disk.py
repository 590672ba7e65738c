"""Save checkpoints to file systems that are too small for them, of every size up to where they fit.

    sudo python tools/benchmarks/checkpoints/fill_disk.py

Mounts a tmpfs of each size, which needs root. The first checkpoint is always written with room; the second finds the
disk full at another place each time. Then the message must say so, the first must be whole, and nothing else be there.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "packages" / "model-center" / "tests"))

from checkpoint_training import make_state, train

from model_center.recipe.checkpoints import CheckpointStore, find_newest

PAGE = 4096


def mount(folder: Path, size: int, *options: str) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)], check=True
    )


def main() -> None:
    for asynchronous in (False, True):
        outcomes: Counter[str] = Counter()
        for spare in range(0, 64 * PAGE, PAGE):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                mount(folder, 1 << 22)
                try:
                    outcomes[attempt(folder, spare, asynchronous=asynchronous)] += 1
                finally:
                    subprocess.run(["umount", name], check=True)
        print("asynchronous" if asynchronous else "synchronous", dict(outcomes), flush=True)


def attempt(folder: Path, spare: int, *, asynchronous: bool) -> str:
    """Save with room, then with `spare` bytes left; returns what was told, without the number of the step."""
    state = make_state()
    train(state, 1)
    store = CheckpointStore(folder / "checkpoints", keep_last=2, keep_best=True, asynchronous=asynchronous)
    store.save(state, step=1, config="x: 1\n")
    store.wait()
    used = sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())
    mount(folder, used + spare, "remount")
    told = "written"
    try:
        store.save(state, step=2, config="x: 1\n")
        store.wait()
    except OSError as error:
        told = str(error).replace(str(folder), "")
    found = find_newest(folder / "checkpoints", verify=True)
    left = sorted(path.name for path in (folder / "checkpoints").glob("*step-*"))
    assert not found.damaged
    assert left == (["step-00000001", "step-00000002"] if told == "written" else ["step-00000001"]), left
    return told


if __name__ == "__main__":
    main()
