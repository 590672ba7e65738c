"""Damage the files of a data set in many ways, and look at what reading them does.

    python tools/benchmarks/indexed/fuzz_files.py --mutations 20000

Each mutation damages one, two or three of `.idx`, `.bin` and `.manifest.json`. Reading may then raise
`IndexedDatasetError`, and nothing else; what it returns must lie in the file; and where `verify_dataset` finds nothing,
every token must be what was written.
"""

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from model_center.dataset.indexed import IndexedDatasetError, MMapIndexedDataset, make_builder, verify_dataset

INTERESTING = [0, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
SUFFIXES = (".idx", ".bin", ".manifest.json")


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content, damaged in one of the ways that disks, copies and editors damage files."""
    data = bytearray(content)
    place = chance.randrange(len(data)) if data else 0
    match chance.randrange(8):
        case 0 if data:  # a flipped bit
            data[place] ^= 1 << chance.randrange(8)
        case 1 if data:  # some other bytes
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        case 2:  # cut short
            del data[place:]
        case 3:  # made longer
            data += chance.randbytes(chance.choice([1, 4, 8, 64]))
        case 4:  # a hole, as after a crash of the system
            length = chance.choice([8, 512, 4096])
            data[place : place + length] = bytes(len(data[place : place + length]))
        case 5:  # another number where one may stand
            size = chance.choice([1, 4, 8])
            offset = chance.choice([9, 17, 18, 26, 34, place])
            data[offset : offset + size] = (chance.choice(INTERESTING) % 2 ** (8 * size)).to_bytes(size, "little")
        case 6:  # a piece twice, or removed
            piece = data[place : place + chance.choice([1, 4, 8, 12])]
            data[place : place + len(piece)] = piece * chance.choice([0, 2])
        case _:  # one digit or letter for another, which leaves JSON readable
            if data:
                data[place] = ord(chance.choice("0123456789abcdef"))
    return bytes(data)


def outcome(prefix: Path, original: list[list[int]]) -> str:
    """Read the damaged files and say what happened."""
    problems = verify_dataset(prefix, vocab_size=60000)
    try:
        dataset = MMapIndexedDataset(prefix)
        total = len(dataset.tokens)
        for index in range(-min(len(dataset), 1000), min(len(dataset), 1000)):
            try:
                assert len(dataset[index]) <= total
            except IndexedDatasetError:
                continue
        read = [item.tolist() for item in dataset]
    except IndexedDatasetError:
        return "refused" if problems else "WRONG: refused, but verification found nothing"
    if problems:
        return "read, but verification found the damage"
    return "unharmed" if read == original else "WRONG: silently other data"


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage the files of a data set, and look at what reading them does.")
    parser.add_argument("--mutations", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    numbers = np.random.default_rng(options.seed)
    seen = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        with make_builder(prefix, dtype="uint16") as builder:
            for length in (5, 0, 300, 17, 1, 64):
                builder.add_item(numbers.integers(0, 60000, length))
                builder.end_document()
        original = [item.tolist() for item in MMapIndexedDataset(prefix)]
        contents = {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}
        for _ in range(options.mutations):
            damaged = chance.sample(SUFFIXES, chance.choice([1, 1, 1, 2, 3]))
            for suffix in SUFFIXES:
                content = contents[suffix]
                Path(f"{prefix}{suffix}").write_bytes(mutated(content, chance) if suffix in damaged else content)
            signal.alarm(10)  # a hang ends the script
            seen[outcome(prefix, original)] += 1
            Path(f"{prefix}.manifest.json").unlink()  # and as a program without checksums reads it
            seen[f"without manifest: {'refused' if refuses(prefix) else 'read'}"] += 1
            signal.alarm(0)
    for what, count in sorted(seen.items()):
        print(f"{count:6} {what}")
    return int(any(what.startswith("WRONG") for what in seen))


def refuses(prefix: Path) -> bool:
    """Whether the files cannot be opened; what can be opened is read to the end."""
    try:
        for item in (dataset := MMapIndexedDataset(prefix)):
            assert len(item) <= len(dataset.tokens)
    except IndexedDatasetError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
