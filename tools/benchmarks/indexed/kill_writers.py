"""Kill writers at random moments while they rebuild a data set that exists, and look at what is left.

    python tools/benchmarks/indexed/kill_writers.py --kills 1000

A parent forks writers that rebuild the data set over and over, each time with other content, and kills each with
SIGKILL after a random time. Then it reads the data set, first as a program that knows nothing of our journal (index and
data taken as they lie there), then with `MMapIndexedDataset` and `verify_dataset`. Content is derived from a number in
the first token, so that old, new and mixed can be told apart.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from model_center.dataset.indexed import MMapIndexedDataset, make_builder, verify_dataset


def items(number: int) -> list[np.ndarray]:
    """The sequences of generation `number`: a different count and different lengths each time."""
    random_numbers = np.random.default_rng(number)
    return [np.array([number]), *(random_numbers.integers(0, 60000, length) for length in range(number % 37))]


def rebuild_for_ever(prefix: Path, number: int) -> None:
    while True:
        number += 1
        with make_builder(prefix, dtype="uint16") as builder:
            for item in items(number % 60000):
                builder.add_item(item)
                builder.end_document()


def is_whole(sequences: list[np.ndarray]) -> bool:
    """Whether these are all sequences of one generation."""
    expected = items(int(sequences[0][0]))
    return len(sequences) == len(expected) and all(map(np.array_equal, sequences, expected))


def foreign_reading(prefix: Path) -> str:
    """What a program sees that knows nothing of our journal: `whole`, `absent` or `mixed`."""
    try:
        index, data = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    except FileNotFoundError:
        return "absent"
    count = int(np.frombuffer(index, "<u8", 1, 18)[0])
    sizes = np.frombuffer(index, "<i4", count, 34)
    tokens = np.frombuffer(data, "<u2")
    if sizes.sum() != len(tokens):
        return "mixed"
    return "whole" if is_whole(np.split(tokens, np.cumsum(sizes)[:-1])) else "mixed"


def kill_one(prefix: Path, number: int, seconds: float) -> None:
    child = os.fork()
    if child == 0:
        rebuild_for_ever(prefix, number)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill writers at random moments and look at what is left.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.03, help="longest life of a writer, in seconds")
    options = parser.parse_args()
    warnings.simplefilter("error")
    moments = random.Random(options.seed)
    seen = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        with make_builder(prefix, dtype="uint16") as builder:
            builder.add_items(items(0))
        number = 0
        for _ in range(options.kills):
            kill_one(prefix, number, moments.uniform(0, options.longest))
            seen[f"foreign reader: {foreign_reading(prefix)}"] += 1
            seen["journal left"] += prefix.with_name(".data.commit").exists()
            seen["temporary files left"] += any(prefix.parent.glob("*.tmp")) or any(prefix.parent.glob(".*.tmp"))
            dataset = MMapIndexedDataset(prefix)
            sound = not verify_dataset(prefix) and is_whole(list(dataset))
            seen["our reader: whole" if sound else "our reader: DAMAGED"] += 1
            seen["new data set" if int(dataset[0][0]) != number else "former data set"] += 1
            number = int(dataset[0][0])
        with make_builder(prefix, dtype="uint16") as builder:
            builder.add_items(items(0))
        left = sorted(path.name for path in Path(folder).iterdir())
    for what, count in sorted(seen.items()):
        print(f"{count:6} {what}")
    print(f"files after one more build: {', '.join(left)}")
    return int(seen["our reader: DAMAGED"] > 0 or seen["foreign reader: mixed"] > 0 or len(left) != 3)


if __name__ == "__main__":
    sys.exit(main())
