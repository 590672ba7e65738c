"""Many files divided between ranks, and their shuffled order."""

import itertools
import json
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center.dataset.indexed import DistributedMMapIndexedDataset, IndexedDatasetError, make_builder
from model_center.dataset.indexed.permutation import Permutation

SIZES = {3: 5, 4: 0, 10: 1, 25: 6}  # sequences by file number: gaps, an empty one, an order that is not alphabetical
TOTAL = sum(SIZES.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequence k of all files is [k, k, …]."""
    folder = tmp_path_factory.mktemp("tokenized")
    value = 0
    for number, count in SIZES.items():
        with make_builder(folder / f"tokenized_{number}.bin", dtype="uint16") as builder:
            for _ in range(count):
                builder.add_item([value] * (value % 3 + 1))
                value += 1
    (folder / "tokenized_x.idx").touch()
    (folder / "other_tokenized_1.idx").touch()
    return folder


def values(dataset: DistributedMMapIndexedDataset) -> list[int]:
    assert [item.tolist() for item in dataset.gather(range(len(dataset)))] == [item.tolist() for item in dataset]
    return [int(item[0]) for item in dataset]


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("world_size", [1, 2, 5, 20])
def test_ranks_share_everything_exactly(seed: int | None, world_size: int, folder: Path) -> None:
    ranks = [
        DistributedMMapIndexedDataset(folder, "tokenized", rank, world_size, seed=seed) for rank in range(world_size)
    ]
    parts = [values(rank) for rank in ranks]
    assert sorted(itertools.chain(*parts)) == list(range(TOTAL))
    lengths = list(map(len, parts))
    assert lengths == list(map(len, ranks))
    assert max(lengths) - min(lengths) <= 1
    # Taken in turns, the ranks give the order of one rank alone.
    alone = values(DistributedMMapIndexedDataset(str(folder), "tokenized", 0, 1, seed=seed))
    assert alone == [parts[i % world_size][i // world_size] for i in range(TOTAL)]
    assert (alone == list(range(TOTAL))) == (seed is None)


def test_each_epoch_has_its_order(folder: Path) -> None:
    dataset = DistributedMMapIndexedDataset(folder, "tokenized", 0, 1, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(values(dataset))
    assert orders[0] == orders[2] != orders[1]
    assert values(DistributedMMapIndexedDataset(folder, "tokenized", 0, 1, seed=1, epoch=1)) == orders[1]


@pytest.mark.parametrize("used", [0, 5, 12, 17, 24])
def test_training_goes_on_with_another_number_of_ranks(used: int, folder: Path) -> None:
    dataset = DistributedMMapIndexedDataset(folder, "tokenized", 0, 1, seed=3)
    stream = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        stream += values(dataset)
    ranks = [DistributedMMapIndexedDataset(folder, "tokenized", rank, 3, seed=3) for rank in range(3)]
    for rank in ranks:
        rank.seek(used)
    parts = [values(rank) for rank in ranks]
    left = TOTAL - used % TOTAL
    assert [parts[i % 3][i // 3] for i in range(left)] == stream[used : used + left]


def test_indexing_and_pickling(folder: Path) -> None:
    dataset = DistributedMMapIndexedDataset(folder, "tokenized", 1, 2, seed=5, epoch=2)
    dataset.set_epoch(2, start=3)
    everything = [item.tolist() for item in dataset]
    assert dataset[-1].tolist() == everything[-1]
    assert [item.tolist() for item in dataset[1:3]] == everything[1:3]
    assert [item.tolist() for item in dataset.gather([-1, 0])] == [everything[-1], everything[0]]
    assert [dataset.sample_number(i) for i in range(len(dataset))] == [item[0] for item in everything]
    assert [item.tolist() for item in pickle.loads(pickle.dumps(dataset))] == everything
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match="must lie in"):
            dataset[index]
        with pytest.raises(IndexError, match="must lie in"):
            dataset.gather([index])


def test_a_file_whose_publication_was_cut_short_counts(folder: Path, tmp_path: Path) -> None:
    with make_builder(tmp_path / "t_1") as builder:
        builder.add_item([1])
    staged = {suffix: f".t_1.0123456789abcdef{suffix}.tmp" for suffix in (".bin", ".manifest.json", ".idx")}
    for suffix, name in staged.items():
        (tmp_path / f"t_1{suffix}").rename(tmp_path / name)
    (tmp_path / ".t_1.commit").write_text(json.dumps(staged))
    assert values(DistributedMMapIndexedDataset(tmp_path, "t", 0, 1)) == [1]


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexedDatasetError, match="there is no data set absent_1"):
        DistributedMMapIndexedDataset(folder, "absent", 0, 1)
    with pytest.raises(IndexedDatasetError, match="must be the folder"):
        DistributedMMapIndexedDataset(folder / "absent", "tokenized", 0, 1)
    with pytest.raises(ValueError, match="`rank` must lie between 0 and `world_size` - 1"):
        DistributedMMapIndexedDataset(folder, "tokenized", 2, 2)
    with pytest.raises(ValueError, match="must not be negative"):
        DistributedMMapIndexedDataset(folder, "tokenized", 0, 1, epoch=-1)
    for number, dtype in ((1, "int32"), (2, "uint16")):
        make_builder(tmp_path / f"mixed_{number}", dtype=dtype).finalize()
    with pytest.raises(IndexedDatasetError, match="mixed_2 holds uint16"):
        DistributedMMapIndexedDataset(tmp_path, "mixed", 0, 1)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 400), seed=st.integers(0, 2**32), epoch=st.integers(0, 9))
def test_a_permutation_has_every_number_once(length: int, seed: int, epoch: int) -> None:
    order = Permutation(length, seed, epoch)
    numbers = [order[position] for position in range(length)]
    assert sorted(numbers) == list(range(length))
    assert order.gather(np.arange(length)).tolist() == numbers


@pytest.mark.parametrize("length", [10**6 + 3, 10**12 + 39, 2**40])
def test_a_permutation_of_any_length_is_computed(length: int) -> None:
    order = Permutation(length, 1)
    positions = np.random.default_rng(0).integers(0, length, 200)
    numbers = order.gather(positions)
    assert numbers.tolist() == [order[int(position)] for position in positions]
    assert ((numbers >= 0) & (numbers < length)).all()
    # Evenly spread: 200 numbers into 4 quarters, each within five standard deviations of 50.
    assert np.abs(np.bincount(numbers * 4 // length, minlength=4) - 50).max() < 5 * math.sqrt(200 * 0.25 * 0.75)


def test_orders_of_different_seeds_are_independent() -> None:
    """Where 0 lands, and what follows it, is uniform over seeds (chi-squared, 99.99% bound for 11 degrees: 37.4)."""
    first, following = Counter[int](), Counter[int]()
    for seed in range(2400):
        order = Permutation(12, seed).gather(np.arange(12)).tolist()
        first[order.index(0)] += 1
        following[(order[5] - order[4]) % 12] += 1
    assert sum((first[i] - 200) ** 2 / 200 for i in range(12)) < 37.4
    assert following[0] == 0
    assert sum((following[i] - 2400 / 11) ** 2 / (2400 / 11) for i in range(1, 12)) < 37.4
