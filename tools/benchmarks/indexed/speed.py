"""Writing and reading indexed data sets, beside Megatron-core and beside the original's way, in one run.

    python tools/benchmarks/indexed/speed.py

Megatron-core is measured where it is installed. The original's way is written here: one array, one write and one Python
integer per sequence, and pointers computed in a loop. Everything is measured several times in turns, and the median is
shown, since other work on the machine slows one or the other at random.
"""

import argparse
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from model_center.dataset.indexed import MMapIndexedDataset, MMapIndexedDatasetBuilder

try:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
except ImportError:
    IndexedDataset = IndexedDatasetBuilder = None

DTYPE = np.uint16


def original_way(prefix: Path, lists: Iterable[list[int]]) -> None:
    """As the document's loop does it (section 1.5.2): `add_item(torch.IntTensor(doc_ids))`."""
    sizes = []
    with prefix.with_suffix(".bin").open("wb") as data:
        for ids in lists:
            array = np.array(torch.IntTensor(ids).numpy(), dtype=DTYPE)
            data.write(array.tobytes())
            sizes.append(array.size)
    pointer, pointers = 0, []
    for size in sizes:
        pointers.append(pointer)
        pointer += size * np.dtype(DTYPE).itemsize
    with prefix.with_suffix(".idx").open("wb") as index:
        index.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), 1))
        for part in (np.array(sizes, np.int32), np.array(pointers, np.int64), np.zeros(1, np.int64)):
            index.write(part.tobytes())


def ours(prefix: Path, add: Callable[[MMapIndexedDatasetBuilder], None], *, sync: bool = True) -> None:
    with MMapIndexedDatasetBuilder(prefix, DTYPE, sync=sync) as builder:
        add(builder)


def one_by_one(builder: MMapIndexedDatasetBuilder, items: Iterable[object]) -> None:
    for item in items:
        builder.add_item(item)  # type: ignore[arg-type]  # lists, arrays and tensors


def in_batches(builder: MMapIndexedDatasetBuilder, arrays: list[np.ndarray]) -> None:
    for start in range(0, len(arrays), 4096):
        builder.add_items(arrays[start : start + 4096])


def megatron(prefix: Path, arrays: Iterable[np.ndarray]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DTYPE)
    for array in arrays:
        builder.add_item(torch.from_numpy(array))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def medians(cases: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of each case: the median of several turns."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def writing(folder: Path, arrays: list[np.ndarray], repeats: int) -> None:
    lists = [array.tolist() for array in arrays]
    flat, sizes = np.concatenate(arrays), [len(array) for array in arrays]
    tensors = [torch.from_numpy(array) for array in arrays]
    compact = flat.astype(DTYPE)
    cases = {
        "the original's way, lists": lambda: original_way(folder / "original", lists),
        "add_item, lists": lambda: ours(folder / "lists", lambda builder: one_by_one(builder, lists)),
        "add_item, int32 tensors": lambda: ours(folder / "tensors", lambda builder: one_by_one(builder, tensors)),
        "add_item, int32 arrays": lambda: ours(folder / "arrays", lambda builder: one_by_one(builder, arrays)),
        "add_items, int32 arrays": lambda: ours(folder / "many", lambda builder: in_batches(builder, arrays)),
        "add_flat, int32": lambda: ours(folder / "flat", lambda builder: builder.add_flat(flat, sizes)),
        "add_flat, uint16": lambda: ours(folder / "same", lambda builder: builder.add_flat(compact, sizes)),
        "add_flat, uint16, sync=False": lambda: ours(
            folder / "unsynced", lambda builder: builder.add_flat(compact, sizes), sync=False
        ),
    }
    if IndexedDataset is not None:
        cases["Megatron-core's add_item, int32 tensors"] = lambda: megatron(folder / "megatron", arrays)
    print(f"writing {len(arrays):,} sequences, {flat.size:,} tokens as uint16 (million tokens/s):")
    for name, seconds in medians(cases, repeats).items():
        print(f"  {flat.size / seconds / 1e6:8.1f}  {name}")
    expected = (folder / "original.bin").read_bytes()
    assert all(path.read_bytes() == expected for path in folder.glob("*.bin"))


def reading(folder: Path, repeats: int, batch: int) -> None:
    dataset = MMapIndexedDataset(folder / "flat")
    order = np.random.default_rng(1).permutation(len(dataset))
    numbers = order.tolist()
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    tokens, starts = dataset.tokens, (dataset.pointers // 2).tolist()
    slices = [slice(starts[i], starts[i] + int(dataset.sizes[i])) for i in numbers]

    def plain() -> None:
        for part in slices:
            tokens[part]

    def single(source: MMapIndexedDataset) -> None:
        for number in numbers:
            source[number]

    def gathered() -> None:
        for some in batches:
            dataset.gather(some)

    def copied() -> None:
        for some in batches:
            dataset.gather_flat(some)

    cases = {
        "a plain slice of an array": plain,
        "dataset[i]": lambda: single(dataset),
        f"gather, batches of {batch}": gathered,
        f"gather_flat (copies), batches of {batch}": copied,
    }
    if IndexedDataset is not None:
        peer = IndexedDataset(str(folder / "megatron"))
        cases["Megatron-core's dataset[i]"] = lambda: single(peer)
    print(f"random reads of 32 to 512 tokens from {len(dataset):,} sequences (million sequences/s):")
    for name, seconds in medians(cases, repeats).items():
        print(f"  {len(dataset) / seconds / 1e6:8.2f}  {name}")


def opening(folder: Path) -> None:
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        MMapIndexedDataset(folder / "flat")
        seconds.append(time.perf_counter() - start)
    print(f"opening: {statistics.median(seconds) * 1e3:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time writing and reading indexed data sets.")
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    lengths = random.integers(32, 513, options.sequences)
    arrays = [random.integers(0, 50000, length).astype(np.int32) for length in lengths]
    with tempfile.TemporaryDirectory() as name:
        writing(Path(name), arrays, options.repeats)
        reading(Path(name), options.repeats, options.batch)
        opening(Path(name))


if __name__ == "__main__":
    main()
