"""The loader on real data sets, workers and processes."""

import json
import multiprocessing
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from toy_tokenizer import ToyTokenizer, write_rows

from model_center.dataset import DistributedDataLoader
from model_center.dataset.bertdataset import DATASET, BertDataset

ROWS = 23


class Numbers(torch.utils.data.Dataset[int]):
    """Row i is the number i."""

    lengths = tuple(1 + (row * 7) % 11 for row in range(ROWS))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> int:
        return index


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def boolq(folder: Path, rank: int = 0, world_size: int = 1) -> BertDataset:
    lines = [json.dumps({"passage": f"p{n} " * (n + 1), "question": f"q{n}", "label": n % 2 == 0}) for n in range(ROWS)]
    write_rows(folder, "BoolQ", "train.jsonl", "\n".join(lines))
    return DATASET["BoolQ"](folder, "train", rank, world_size, ToyTokenizer())


def seen(loader: DistributedDataLoader) -> list[int]:
    return [row for batch in loader for row in batch.tolist()]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_order_without_shuffling_is_that_of_the_rows() -> None:
    loader = DistributedDataLoader(Numbers(), 4)
    assert next(iter(loader)).tolist() == [0, 1, 2, 3]
    assert seen(loader) == list(range(ROWS))
    assert len(loader) == 6


@pytest.mark.parametrize("bucketed", [False, True])
def test_shuffling_differs_by_epoch_and_repeats_by_seed(bucketed: bool) -> None:
    loader, again = (DistributedDataLoader(Numbers(), 4, True, bucket_by_length=bucketed) for _ in range(2))
    first, second = seen(loader), seen(loader)
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second
    assert [seen(again), seen(again)] == [first, second]
    again.set_epoch(0)
    assert seen(again) == first
    other = DistributedDataLoader(Numbers(), 4, True, seed=1, bucket_by_length=bucketed)
    assert seen(other) != first


def test_leaving_an_epoch_early_begins_the_next() -> None:
    whole, left = (DistributedDataLoader(Numbers(), 4, shuffle=True) for _ in range(2))
    _, second = seen(whole), seen(whole)
    next(iter(left))
    assert left.epoch == 0
    assert seen(left) == second
    assert left.epoch == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [0, 1, 4, 5])
def test_resuming_continues_the_epoch_and_those_after_it(workers: int, step: int) -> None:
    loader, resumed, smaller = (
        DistributedDataLoader(Numbers(), size, shuffle=True, num_workers=workers) for size in (5, 5, 3)
    )
    seen(loader)
    batches = iter(loader)
    before = [next(batches).tolist() for _ in range(step)]
    state = json.loads(json.dumps(loader.state_dict()))
    rest = [batch.tolist() for batch in batches]
    assert sorted(flat(before + rest)) == list(range(ROWS))
    resumed.load_state_dict(state)
    resumed.set_epoch(resumed.epoch)
    assert [batch.tolist() for batch in resumed] == rest
    assert resumed.epoch == 2
    assert seen(resumed) == seen(loader)
    smaller.load_state_dict(state)
    assert seen(smaller) == flat(rest)


def test_workers_are_seeded_alike_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    loader = DistributedDataLoader(Numbers(), 4, shuffle=True, num_workers=1, persistent_workers=True)
    assert sorted(seen(loader)) == sorted(seen(loader)) == list(range(ROWS))
    assert torch.equal(torch.get_rng_state(), expected)


def test_batch_indices_name_the_rows_of_the_batch() -> None:
    loader = DistributedDataLoader(Numbers(), 4, shuffle=True, num_workers=2)
    for batch in loader:
        assert loader.batch_indices == batch.tolist()


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_batches_of_any_structure_move_to_the_device() -> None:
    def collate(items: list[int]) -> Any:
        tensor = torch.tensor(items)
        return {"pair": Pair(tensor, tensor + 1), "list": [tensor, "text"], "tuple": (tensor, 3)}

    loader = DistributedDataLoader(Numbers(), 4, collate_fn=collate, device="meta")
    batch = next(iter(loader))
    assert isinstance(batch["pair"], Pair)
    assert {batch["pair"].right.device.type, batch["list"][0].device.type, batch["tuple"][0].device.type} == {"meta"}
    assert batch["list"][1] == "text"
    assert batch["tuple"][1] == 3
    default = next(iter(DistributedDataLoader(Numbers(), 4)))
    assert default.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_to_the_gpu_of_this_process(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count() - 1))
    loader = DistributedDataLoader(Numbers(), 4, shuffle=True, num_workers=workers)
    for batch in loader:
        assert batch.device == torch.device("cuda", torch.cuda.device_count() - 1)
        assert batch.tolist() == loader.batch_indices


# How a script may use both: data set with rank and world size or without, a loader or PyTorch's own.
def all_ranks(folder: Path, world_size: int, dataset_knows: bool) -> list[DistributedDataLoader]:
    places = [(rank, world_size) if dataset_knows else (0, 1) for rank in range(world_size)]
    return [
        DistributedDataLoader(boolq(folder, *place), 4, True, rank=rank, world_size=world_size)
        for rank, place in enumerate(places)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dataset_knows", [False, True])
def test_no_row_is_lost_or_doubled_between_data_set_and_loader(
    tmp_path: Path, world_size: int, dataset_knows: bool
) -> None:
    loaders = all_ranks(tmp_path, world_size, dataset_knows)
    rows = [row for loader in loaders for _ in loader for row in loader.batch_indices]
    assert sorted(rows) == list(range(ROWS))
    assert {len(loader) for loader in loaders} == {-(-ROWS // (4 * world_size))}


def test_a_share_of_the_rows_can_be_read_without_our_loader(tmp_path: Path) -> None:
    shares = [boolq(tmp_path, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [8, 8, 7]
    lengths = [len(share[index]["input_ids"]) for share in shares for index in range(len(share))]
    assert sorted(lengths) == sorted(boolq(tmp_path).lengths.tolist())
    plain = torch.utils.data.DataLoader(shares[1], 3, collate_fn=shares[1].collate)
    assert sum(len(batch["labels"]) for batch in plain) == 8
    alone = DistributedDataLoader(shares[1], 3, rank=0, world_size=1)
    assert sum(len(batch["labels"]) for batch in alone) == 8


class Masked(torch.utils.data.Dataset[Any]):
    """A data set around another, as in section 1.5.3 of the document."""

    def __init__(self, ctx: BertDataset) -> None:
        self.ctx = ctx

    def __len__(self) -> int:
        return len(self.ctx)


def test_shares_that_the_loader_would_share_out_again_are_refused(tmp_path: Path) -> None:
    share = boolq(tmp_path, 1, 2)
    with pytest.raises(ValueError, match="rows of rank 1 of 2, but the loader is rank 0 of 2"):
        DistributedDataLoader(share, 3, rank=0, world_size=2)
    with pytest.raises(ValueError, match="already holds only one rank's rows"):
        DistributedDataLoader(torch.utils.data.Subset(share, [0, 1, 2]), 3, rank=1, world_size=2)
    with pytest.raises(ValueError, match="already holds only one rank's rows"):
        DistributedDataLoader(torch.utils.data.ConcatDataset([share, share]), 3, rank=1, world_size=2)
    with pytest.raises(ValueError, match="already holds only one rank's rows"):
        DistributedDataLoader(Masked(share), 3, rank=1, world_size=2)
    assert len(DistributedDataLoader(Masked(share), 3, rank=0, world_size=1)) == 4


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_arguments_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`dataset` must have a length and be indexable.*is a Stream"):
        DistributedDataLoader(Stream(), 2)
    with pytest.raises(ValueError, match="`rank` and `world_size` belong together"):
        DistributedDataLoader(Numbers(), 2, rank=0)
    with pytest.raises(ValueError, match=r"needs `dataset.lengths`"):
        DistributedDataLoader([1, 2, 3], 2, bucket_by_length=True)
    loader = DistributedDataLoader(Numbers(), 2)
    early = iter(loader)
    next(early)
    seen(loader)
    with pytest.raises(RuntimeError, match="this epoch has ended"):
        next(early)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert seen(DistributedDataLoader(Numbers(), 2))[:2] == [1, 3]


def _documented_script(rank: int, folder: Path, results: "Queue[Any]") -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    dataset = boolq(folder / str(rank), torch.distributed.get_rank(), torch.distributed.get_world_size())
    loader = DistributedDataLoader(dataset, batch_size=4, shuffle=True)
    epochs: list[list[int]] = []
    state: dict[str, Any] = {}
    for _ in range(2):
        rows = []
        for batch in loader:
            torch.distributed.all_reduce(batch["labels"].sum())  # fails unless both make as many steps
            rows += loader.batch_indices
            state = loader.state_dict() if len(rows) == 8 else state
        epochs.append(rows)
    results.put((rank, epochs, state))
    torch.distributed.destroy_process_group()


def test_two_processes_share_out_each_epoch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Queue[Any] = context.Queue()
    processes = [
        context.Process(target=_documented_script, args=(rank, tmp_path, results), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    (_, mine, state), (_, other, other_state) = answers
    for number in range(2):
        assert sorted(mine[number] + other[number]) == list(range(ROWS))
    assert mine[0] != mine[1]
    assert state == other_state
    # One process goes on where the two were in their second epoch.
    alone = DistributedDataLoader(boolq(tmp_path), 4, shuffle=True)
    alone.load_state_dict(state)
    rows = [row for _ in alone for row in alone.batch_indices]
    assert sorted(rows + mine[1][:8] + other[1][:8]) == list(range(ROWS))
