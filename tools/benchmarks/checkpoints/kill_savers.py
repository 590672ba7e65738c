"""Kill training processes at random moments while they save checkpoints, and look at what is left.

    python tools/benchmarks/checkpoints/kill_savers.py --kills 200

Each process goes on from the newest checkpoint, trains a step, saves, and so on, until SIGKILL comes. After each kill
the newest checkpoint must be whole to the last checksum, nothing that was complete may be damaged or lost, and the next
process must go on from there. At the end the weights, the optimizer and the random generators must be those of as many
steps without interruption, bit by bit (with one process).
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "packages" / "model-center" / "tests"))

from checkpoint_training import kill_savers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="for synchronous and for asynchronous writing each")
    parser.add_argument("--processes", type=int, default=1, help="processes that train together")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--mode", choices=["both", "sync", "async"], default="both", help="how checkpoints are written")
    options = parser.parse_args()
    for asynchronous in {"both": (False, True), "sync": (False,), "async": (True,)}[options.mode]:
        with tempfile.TemporaryDirectory() as folder:
            found = kill_savers(
                Path(folder) / "checkpoints",
                options.kills,
                asynchronous=asynchronous,
                world_size=options.processes,
                number=options.seed,
            )
        print("asynchronous" if asynchronous else "synchronous", found, flush=True)


if __name__ == "__main__":
    main()
