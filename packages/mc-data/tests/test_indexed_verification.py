"""Damage is found, and what can be mended without guessing is."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

from model_center.dataset.indexed import (
    IndexedDatasetError,
    MMapIndexedDataset,
    make_builder,
    repair_dataset,
    verify_dataset,
)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with make_builder(tmp_path / "data", dtype="uint16", provenance={"tokenizer": {"name": "t"}}) as builder:
        builder.add_items([[1, 2, 3], [4], [5, 6]])
        builder.add_boundaries([2, 3])
    return tmp_path / "data"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def original_writer(prefix: Path, items: list[list[int]], boundaries: list[int]) -> None:
    """Writes as the original ModelCenter did, which marked only the documents it was told of."""
    sizes = [len(item) for item in items]
    pointers = [2 * sum(sizes[:i]) for i in range(len(items))]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(items), len(boundaries))
    body = struct.pack(f"<{len(items)}i{len(items)}q{len(boundaries)}q", *sizes, *pointers, *boundaries)
    prefix.with_suffix(".idx").write_bytes(head + body)
    prefix.with_suffix(".bin").write_bytes(np.array(list(itertools.chain(*items)), dtype="<u2").tobytes())


def test_a_sound_data_set(prefix: Path) -> None:
    assert verify_dataset(prefix) == []
    assert verify_dataset(f"{prefix}.idx", vocab_size=7) == []
    assert repair_dataset(prefix) == []


def test_every_flipped_bit_is_found(prefix: Path) -> None:
    for suffix in (".bin", ".idx", ".manifest.json"):
        path = prefix.with_name(f"data{suffix}")
        for offset in range(path.stat().st_size):
            flip(path, offset)
            assert verify_dataset(prefix), (suffix, offset)
            flip(path, offset)
    assert verify_dataset(prefix) == []


def test_damage_is_located_and_not_repaired_by_guessing(tmp_path: Path) -> None:
    with make_builder(tmp_path / "data", dtype="uint8") as builder:
        builder.add_item(np.zeros(9 << 20, dtype=np.uint8))
    flip(tmp_path / "data.bin", 8 << 20)
    assert verify_dataset(tmp_path / "data") == [f"{tmp_path}/data.bin: damaged between bytes 8388608 and 9437184"]
    with pytest.raises(IndexedDatasetError, match=r"damaged between bytes 8388608.*cannot be repaired"):
        repair_dataset(tmp_path / "data")


def test_ids_outside_the_vocabulary(prefix: Path) -> None:
    assert verify_dataset(prefix, vocab_size=5) == [f"{prefix}: sequence 2 holds the id 5, outside 0 to 4"]


@pytest.mark.parametrize(
    ("marked", "repaired"), [([0], [0, 1, 2, 3]), ([0, 2], [0, 2, 3])], ids=["nothing marked", "the end not marked"]
)
def test_files_of_the_original_writer(marked: list[int], repaired: list[int], tmp_path: Path) -> None:
    original_writer(tmp_path / "data", [[1, 2], [3], [4]], marked)
    assert [item.tolist() for item in MMapIndexedDataset(tmp_path / "data")] == [[1, 2], [3], [4]]
    problems = verify_dataset(tmp_path / "data")
    assert [("which Megatron refuses" in text, "no checksum" in text) for text in problems] == [
        (True, False),
        (False, True),
    ]
    data = (tmp_path / "data.bin").stat()
    done = repair_dataset(tmp_path / "data")
    assert done == ["wrote a manifest", f"completed the document boundaries: {len(repaired) - 1} documents"]
    assert verify_dataset(tmp_path / "data") == []
    assert MMapIndexedDataset(tmp_path / "data").doc_idx.tolist() == repaired
    assert (tmp_path / "data.bin").stat().st_ino == data.st_ino
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "data.manifest.json"]


def test_boundaries_are_completed_without_losing_the_manifest(prefix: Path) -> None:
    index = prefix.with_suffix(".idx")
    builder = make_builder(prefix, dtype="uint16", provenance={"tokenizer": {"name": "t"}})
    builder.add_item([1])
    builder.end_document()
    builder.add_item([2])
    with pytest.warns(UserWarning, match="belong to no document"):
        builder.finalize()
    before = index.read_bytes()
    assert repair_dataset(prefix) == ["completed the document boundaries: 2 documents"]
    dataset = MMapIndexedDataset(prefix)
    assert dataset.manifest is not None
    assert dataset.manifest.provenance == {"tokenizer": {"name": "t"}}
    assert len(index.read_bytes()) == len(before) + 8


def test_a_manifest_of_other_files_is_replaced(prefix: Path) -> None:
    original_writer(prefix, [[9]], [0, 1])
    assert repair_dataset(prefix) == ["replaced a manifest that is damaged or belongs to other files"]
    assert verify_dataset(prefix) == []


def test_what_a_killed_writer_left_is_removed(prefix: Path) -> None:
    prefix.with_name(".data.0123456789abcdef.bin.tmp").touch()
    assert repair_dataset(prefix) == ["removed 1 temporary files of writers that were killed"]
    assert verify_dataset(prefix) == []


def test_a_broken_index_is_not_repaired(prefix: Path) -> None:
    flip(prefix.with_suffix(".idx"), 36)
    with pytest.raises(IndexedDatasetError, match="is not the end of the sequence before"):
        repair_dataset(prefix)
    assert len(verify_dataset(prefix)) == 1
