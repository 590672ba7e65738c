"""A data set appears complete or not at all, and a former one stays until then."""

import json
import os
import resource
import signal
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from model_center.dataset.indexed import IndexedDatasetError, MMapIndexedDataset, make_builder
from model_center.dataset.indexed.durable import complete_publication, remove_stale, write_atomically

FILES = ["data.bin", "data.idx", "data.manifest.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tokens(prefix: Path) -> list[int]:
    return [int(token) for token in MMapIndexedDataset(prefix).tokens]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with make_builder(tmp_path / "data") as builder:
        builder.add_item([1, 1])
    return tmp_path / "data"


def test_only_three_files_stay(prefix: Path) -> None:
    assert names(prefix.parent) == FILES


def test_an_exception_leaves_the_former_data_set(prefix: Path) -> None:
    def build() -> None:
        with make_builder(prefix) as builder:
            builder.add_item([2])
            builder.add_item([2**40])

    with pytest.raises(ValueError, match="must fit int32"):
        build()
    assert tokens(prefix) == [1, 1]
    assert names(prefix.parent) == FILES


def test_a_forgotten_builder_leaves_nothing(prefix: Path) -> None:
    make_builder(prefix).add_item([2])
    assert tokens(prefix) == [1, 1]
    assert names(prefix.parent) == FILES


def write_too_much(prefix: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20))
    builder = make_builder(prefix)
    try:
        for _ in range(4):
            builder.add_item(np.full(2 << 20, 2))
    except OSError:
        with pytest.raises(ValueError, match="is closed"):
            builder.finalize()
        os._exit(7)


def test_a_full_disk_leaves_the_former_data_set(prefix: Path) -> None:
    process = get_context("spawn").Process(target=write_too_much, args=(prefix,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert tokens(prefix) == [1, 1]
    assert names(prefix.parent) == FILES


def write_and_die(prefix: Path) -> None:
    builder = make_builder(prefix)
    builder.add_item([2])
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_writer_removes_what_a_killed_one_left(prefix: Path) -> None:
    process = get_context("spawn").Process(target=write_and_die, args=(prefix,))
    process.start()
    process.join()
    assert len(names(prefix.parent)) == 4
    (prefix.parent / ".data.b.0123456789abcdef.bin.tmp").touch()  # belongs to a data set "data.b"
    living = make_builder(prefix)
    assert len(names(prefix.parent)) == 5
    assert remove_stale(prefix) == []
    living.add_item([3])
    living.finalize()
    assert tokens(prefix) == [3]
    assert names(prefix.parent) == [".data.b.0123456789abcdef.bin.tmp", *FILES]


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_publication_that_was_cut_short_is_completed(done: int, prefix: Path) -> None:
    """`done` of the renames were carried out when the writer was killed."""
    with make_builder(prefix.with_name("new")) as builder:
        builder.add_item([5, 6, 7])
    suffixes = [".bin", ".manifest.json", ".idx"]
    staged = {suffix: f".data.0123456789abcdef{suffix}.tmp" for suffix in suffixes}
    for suffix, name in staged.items():
        prefix.with_name(f"new{suffix}").rename(prefix.with_name(name))
    journal = prefix.with_name(".data.commit")
    journal.write_text(json.dumps(staged))
    if done:
        prefix.with_name("data.idx").unlink()
    for suffix in suffixes[:done]:
        prefix.with_name(staged[suffix]).rename(prefix.with_name(f"data{suffix}"))
    assert tokens(prefix) == [5, 6, 7]
    assert names(prefix.parent) == FILES
    assert not complete_publication(prefix)


def test_a_journal_can_name_no_file_of_others(prefix: Path) -> None:
    journal = prefix.with_name(".data.commit")
    for text in ("", "[]", "{}", '{".idx": "../x.idx.tmp"}', '{".idx": ".data.0123456789abcdef.bin.tmp"}'):
        journal.write_text(text)
        with pytest.raises(IndexedDatasetError, match="not a journal"):
            MMapIndexedDataset(prefix)


def test_a_data_set_without_manifest_replaces_one_with(prefix: Path) -> None:
    """The old manifest must not stay beside new data that has none."""
    index, data = (prefix.with_name(f".data.0123456789abcdef{suffix}.tmp") for suffix in (".idx", ".bin"))
    index.write_bytes(prefix.with_suffix(".idx").read_bytes())
    data.write_bytes(prefix.with_suffix(".bin").read_bytes())
    prefix.with_name(".data.commit").write_text(json.dumps({".idx": index.name, ".bin": data.name}))
    assert MMapIndexedDataset(prefix).manifest is None


def test_write_atomically(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert names(tmp_path) == ["file"]


def replace_often(prefix: Path, value: int, count: int) -> None:
    for _ in range(count):
        with make_builder(prefix) as builder:
            builder.add_item([value] * value)


def test_readers_and_writers_at_once_never_see_a_mixture(prefix: Path) -> None:
    context = get_context("spawn")
    writers = [context.Process(target=replace_often, args=(prefix, value, 25)) for value in (2, 3)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        dataset = MMapIndexedDataset(prefix)
        value = int(dataset.tokens[0])
        assert dataset.tokens.tolist() == ([1, 1] if value == 1 else [value] * value)
        reads += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert reads
    assert names(prefix.parent) == FILES
