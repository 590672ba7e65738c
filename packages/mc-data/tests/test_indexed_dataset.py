"""Writing and reading indexed data sets: bytes, values, errors."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center.dataset.indexed import (
    IndexedDatasetError,
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
    best_fitting_dtype,
    make_builder,
)

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def naive_index(items: list[list[int]], boundaries: list[int], dtype: str) -> bytes:
    """The layout written out with struct alone."""
    data = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(items), len(boundaries))
    pointer, pointers = 0, []
    for item in items:
        pointers.append(pointer)
        pointer += len(item) * np.dtype(dtype).itemsize
    data += b"".join(struct.pack("<i", len(item)) for item in items)
    return data + b"".join(struct.pack("<q", value) for value in (*pointers, *boundaries))


def write(prefix: Path, items: list[Any], dtype: Any = np.int32, document: int = 0) -> Path:
    builder = make_builder(f"{prefix}.bin", impl="mmap", dtype=dtype)
    for number, item in enumerate(items, start=1):
        builder.add_item(item)
        if document and number % document == 0:
            builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_golden_files_are_read_and_written_byte_for_byte(dtype: str, shared_dir: Path, tmp_path: Path) -> None:
    golden = shared_dir / "golden" / "indexed"
    items = json.loads((golden / "items.json").read_text())[f"public/{dtype}"]
    dataset = MMapIndexedDataset(golden / dtype)
    assert [item.tolist() for item in dataset] == items
    with pytest.warns(UserWarning, match="the last 1 sequences belong to no document"):
        write(tmp_path / "copy", items, dtype, document=7)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == (golden / f"{dtype}{suffix}").read_bytes()


@settings(max_examples=30, deadline=None)
@given(
    items=st.lists(st.lists(st.integers(0, 100), max_size=9), max_size=12),
    documents=st.lists(st.booleans(), min_size=12, max_size=12),
    dtype=st.sampled_from(sorted(CODES)),
    bulk=st.booleans(),
)
def test_any_items_give_the_documented_bytes(
    tmp_path_factory: pytest.TempPathFactory, items: list[list[int]], documents: list[bool], dtype: str, bulk: bool
) -> None:
    prefix = tmp_path_factory.mktemp("any") / "data"
    boundaries = [0] + [i + 1 for i in range(len(items)) if documents[i] or i == len(items) - 1]
    with make_builder(prefix, dtype=dtype) as builder:
        if bulk:
            builder.add_items(items)
            builder.add_boundaries(boundaries[1:])
        else:
            for i, item in enumerate(items):
                builder.add_item(item)
                if i + 1 in boundaries:
                    builder.end_document()
    assert prefix.with_suffix(".idx").read_bytes() == naive_index(items, boundaries, dtype)
    flat = [token for item in items for token in item]
    assert prefix.with_suffix(".bin").read_bytes() == np.array(flat, dtype=dtype).tobytes()
    assert [item.tolist() for item in MMapIndexedDataset(prefix)] == items


def test_indexing(tmp_path: Path) -> None:
    items = [[1, 2, 3], [], [4], [5, 6]]
    dataset = MMapIndexedDataset(write(tmp_path / "data", items, document=2))
    assert len(dataset) == 4
    assert dataset[-1].tolist() == [5, 6]
    assert [item.tolist() for item in dataset[1:]] == items[1:]
    assert [item.tolist() for item in dataset[::-2]] == items[::-2]
    assert dataset.sizes.tolist() == [3, 0, 1, 2]
    assert dataset.doc_idx.tolist() == [0, 2, 4]
    assert dataset.get(0, 1).tolist() == [2, 3]
    assert dataset.get(0, offset=1, length=1).tolist() == [2]
    assert dataset.get(0).dtype == np.int32
    assert [item.tolist() for item in dataset.gather([3, 0, -2])] == [[5, 6], [1, 2, 3], [4]]
    tokens, offsets = dataset.gather_flat([3, 1, 0])
    assert (tokens.tolist(), offsets.tolist()) == ([5, 6, 1, 2, 3], [0, 2, 2, 5])
    assert [item.tolist() for item in pickle.loads(pickle.dumps(dataset))] == items
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 9
    for index in (4, -5):
        with pytest.raises(IndexError, match=r"\[-4, 4\)"):
            dataset[index]
        with pytest.raises(IndexError):
            dataset.gather([index])
    with pytest.raises(ValueError, match="3 tokens of 0"):
        dataset.get(0, 1, 3)


def test_sequences_outlive_the_data_set(tmp_path: Path) -> None:
    sequence = MMapIndexedDataset(write(tmp_path / "data", [[7, 8]]))[0]
    assert sequence.tolist() == [7, 8]


class Tensor:
    """Looks to numpy like a CPU tensor."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.values, dtype=dtype or np.int32)


@pytest.mark.parametrize("item", [[3, 4], (3, 4), np.array([3, 4], dtype=np.uint8), Tensor([3, 4]), range(3, 5)])
def test_anything_like_an_array_is_taken(item: Any, tmp_path: Path) -> None:
    assert MMapIndexedDataset(write(tmp_path / "data", [item], "uint16"))[0].tolist() == [3, 4]


def test_a_buffer_may_be_reused_by_its_owner(tmp_path: Path) -> None:
    buffer = np.zeros(2, dtype=np.int64)
    with make_builder(tmp_path / "data") as builder:
        for value in (1, 2):
            buffer[:] = value
            builder.add_item(buffer)
    assert MMapIndexedDataset(tmp_path / "data").tokens.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("item", "dtype", "message"),
    [
        ([5, 65536], "uint16", "holds 65536"),
        ([-1], "uint16", "holds -1"),
        ([2**31], "int32", "holds 2147483648"),
        (np.array([2**63], dtype=np.uint64), "int64", "holds 9223372036854775808"),
        ([1.5], "int32", "has float64 values"),
        ([1e300], "float32", "larger values"),
        ([[1, 2]], "int32", r"shape \(1, 2\)"),
        (3, "int32", r"shape \(\)"),
        (np.array([True]), "int32", "has bool values"),
    ],
)
def test_what_does_not_fit_is_an_error_and_appends_nothing(item: Any, dtype: str, message: str, tmp_path: Path) -> None:
    with make_builder(tmp_path / "data", dtype=dtype) as builder:
        builder.add_item([1])
        with pytest.raises(ValueError, match=message):
            builder.add_item(item)
        builder.add_items([[2], [3]])
        with pytest.raises(ValueError, match="must add up to the 2 tokens"):
            builder.add_flat([1, 2], [1])
        with pytest.raises(ValueError, match="between 0 and"):
            builder.add_flat([1], [2, -1])
        with pytest.raises(ValueError, match="must rise"):
            builder.add_boundaries([9])
    assert MMapIndexedDataset(tmp_path / "data").tokens.tolist() == [1, 2, 3]


def test_without_end_document_every_sequence_is_a_document(tmp_path: Path) -> None:
    assert MMapIndexedDataset(write(tmp_path / "data", [[1], [2, 3]])).doc_idx.tolist() == [0, 1, 2]


def test_merge_appends_sequences_and_documents(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1], [2, 3], [4]], "uint16", document=3)
    write(tmp_path / "b", [[5, 6]], "uint16")
    with make_builder(tmp_path / "merged", dtype="uint16") as builder:
        builder.add_item([0])
        builder.merge_file_(tmp_path / "a")
        builder.merge_file_(str(tmp_path / "b.bin"))
    merged = MMapIndexedDataset(tmp_path / "merged")
    assert [item.tolist() for item in merged] == [[0], [1], [2, 3], [4], [5, 6]]
    assert merged.doc_idx.tolist() == [0, 1, 4, 5]
    with make_builder(tmp_path / "other", dtype="int32") as builder, pytest.raises(ValueError, match="holds uint16"):
        builder.merge_file_(tmp_path / "a")


def test_more_than_one_block(tmp_path: Path) -> None:
    tokens = np.arange(5_000_000, dtype=np.int32)
    with make_builder(tmp_path / "data", dtype=np.int32) as builder:
        builder.add_flat(tokens, [4_000_000, 1_000_000])
        builder.add_item(tokens)
    dataset = MMapIndexedDataset(tmp_path / "data")
    assert np.array_equal(dataset.tokens, np.concatenate([tokens, tokens]))
    assert dataset.sizes.tolist() == [4_000_000, 1_000_000, 5_000_000]


def test_a_closed_builder_says_so(tmp_path: Path) -> None:
    builder = make_builder(tmp_path / "data")
    with pytest.raises(ValueError, match=r"must be .*data\.idx"):
        builder.finalize(tmp_path / "else.idx")
    builder.finalize()
    with pytest.raises(ValueError, match="is closed"):
        builder.finalize()
    with pytest.raises(ValueError, match="is closed"):
        builder.add_item([1])
    assert len(MMapIndexedDataset(tmp_path / "data")) == 0


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be \"mmap\", but is 'lazy'"):
        make_builder(tmp_path / "data", impl="lazy")
    with pytest.raises(ValueError, match=r"one of uint8.*but is complex128"):
        MMapIndexedDatasetBuilder(tmp_path / "data", dtype=complex)
    assert list(tmp_path.iterdir()) == []


def test_best_fitting_dtype() -> None:
    assert [best_fitting_dtype(size) for size in (None, 65499, 65500)] == [np.int32, np.uint16, np.int32]


def damage(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "offset", "data", "message"),
    [
        (".idx", 0, b"X", "not an indexed data set"),
        (".idx", 9, b"\x02", "knows format version 1, the file has 2"),
        (".idx", 17, b"\x09", "dtype code must be 1 to 8, but is 9"),
        (".idx", 17, b"\x05", "no whole number of int64"),
        (".idx", 18, b"\x03", "take 86 bytes, but the file has 74"),
        (".idx", 34, b"\x02", "the pointer of sequence 1, 12, is not"),
        (".idx", 38, b"\xff\xff\xff\xff", "sequence 1 has a negative size"),
        (".idx", 38, b"\x07", "end at byte 40 of the .bin file, which has 20"),
        (".idx", 50, b"\x0d", "the pointer of sequence 1, 13, is not"),
        (".idx", 58, b"\x09", "the first document boundary must be 0"),
        (".manifest.json", 60, b"??", "damaged"),
    ],
)
def test_damage_is_found_at_opening(suffix: str, offset: int, data: bytes, message: str, tmp_path: Path) -> None:
    with make_builder(tmp_path / "data", dtype=np.int32) as builder:
        builder.add_items([[1, 2, 3], [4, 5]])
        builder.end_document()
    assert len((tmp_path / "data.idx").read_bytes()) == 74
    damage(tmp_path / f"data{suffix}", offset, data)
    with pytest.raises(IndexedDatasetError, match=message):
        MMapIndexedDataset(tmp_path / "data")


def test_missing_and_shortened_files(tmp_path: Path) -> None:
    with pytest.raises(IndexedDatasetError, match=r"absent\.idx: there is no such index"):
        MMapIndexedDataset(tmp_path / "absent")
    prefix = write(tmp_path / "data", [[1, 2, 3]])
    assert MMapIndexedDataset.exists(prefix)
    prefix.with_suffix(".bin").write_bytes(b"1234")
    with pytest.raises(IndexedDatasetError, match=r"end at byte 12 of the \.bin file, which has 4"):
        MMapIndexedDataset(prefix)
    prefix.with_suffix(".bin").unlink()
    assert not MMapIndexedDataset.exists(prefix)
    with pytest.raises(IndexedDatasetError, match="the index is there, but not its data"):
        MMapIndexedDataset(prefix)
    prefix.with_suffix(".idx").write_bytes(b"MMIDIDX")
    prefix.with_suffix(".bin").touch()
    with pytest.raises(IndexedDatasetError, match="34 bytes of header, found 7"):
        MMapIndexedDataset(prefix)


def test_a_foreign_rebuild_is_noticed_by_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "data", [[1, 2, 3]])
    write(tmp_path / "foreign", [[1, 2]])
    for suffix in (".bin", ".idx"):
        (tmp_path / f"foreign{suffix}").replace(tmp_path / f"data{suffix}")
    with pytest.raises(IndexedDatasetError, match="replaced without it"):
        MMapIndexedDataset(tmp_path / "data")
    (tmp_path / "data.manifest.json").unlink()
    assert MMapIndexedDataset(tmp_path / "data").tokens.tolist() == [1, 2]
