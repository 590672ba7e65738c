"""Merging, splitting, inspecting data sets, and shuffling lines."""

import gzip
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_encoders import CharacterTokenizer

from model_center.dataset.indexed import MMapIndexedDataset, make_builder, verify_dataset
from model_center.tools import (
    InputError,
    decoded_samples,
    merge_datasets,
    plot_lengths,
    shuffle_lines,
    split_dataset,
    summarize,
)

Documents = list[list[list[int]]]


def build(prefix: Path, documents: Documents, dtype: str = "uint16", **provenance: Any) -> Path:
    with make_builder(prefix, dtype=dtype, provenance=provenance) as builder:
        for document in documents:
            builder.add_items(document)
            builder.end_document()
    return prefix


def documents_of(prefix: Path) -> Documents:
    dataset = MMapIndexedDataset(prefix)
    bounds = dataset.doc_idx.tolist()
    return [[item.tolist() for item in dataset[a:b]] for a, b in itertools.pairwise(bounds)]


@pytest.fixture
def documents() -> Documents:
    random = np.random.default_rng(0)
    return [[random.integers(0, 99, random.integers(0, 5)).tolist() for _ in range(i % 3)] for i in range(20)]


@pytest.mark.parametrize(
    ("weights", "lengths"), [([1.0], [20]), ([1, 1, 1, 1], [5, 5, 5, 5]), ([90, 5, 5], [18, 1, 1]), ([0, 1], [0, 20])]
)
def test_split_and_merge_undo_each_other(
    weights: list[float], lengths: list[int], documents: Documents, tmp_path: Path
) -> None:
    whole = build(tmp_path / "whole", documents, tokenizer={"name": "t", "fingerprint": "a"})
    parts = split_dataset(whole, tmp_path / "part", weights)
    assert [len(documents_of(part)) for part in parts] == lengths
    assert [document for part in parts for document in documents_of(part)] == documents
    merge_datasets([f"{part}{suffix}" for part in parts for suffix in (".bin", ".idx")], tmp_path / "again")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert verify_dataset(tmp_path / "again") == []
    manifest = MMapIndexedDataset(tmp_path / "again").manifest
    assert manifest is not None
    assert manifest.provenance["tokenizer"] == {"name": "t", "fingerprint": "a"}


def test_merge_and_split_refuse(documents: Documents, tmp_path: Path) -> None:
    first = build(tmp_path / "first", documents, tokenizer={"name": "t", "fingerprint": "a"})
    second = build(tmp_path / "second", documents, tokenizer={"name": "u", "fingerprint": "b"})
    wide = build(tmp_path / "wide", documents, dtype="int32")
    with pytest.raises(ValueError, match=r"must come from one tokenizer, but .*first is t's and .*second u's"):
        merge_datasets([first, second], tmp_path / "out")
    with pytest.raises(ValueError, match=r"must hold uint16, but .*wide holds int32"):
        merge_datasets([first, wide], tmp_path / "out")
    with pytest.raises(ValueError, match="second exists; `overwrite` replaces it"):
        merge_datasets([first], second)
    with pytest.raises(ValueError, match="there is no such index"):
        merge_datasets([tmp_path / "absent"], tmp_path / "out")
    for weights in ([], [0, 0], [2, -1]):
        with pytest.raises(ValueError, match="`weights` must be numbers from 0 on"):
            split_dataset(first, tmp_path / "out", weights)
    assert not MMapIndexedDataset.exists(tmp_path / "out")
    merge_datasets([first], second, overwrite=True)
    assert documents_of(second) == documents


def test_a_summary_counts_everything(documents: Documents, tmp_path: Path) -> None:
    prefix = build(tmp_path / "data", documents, made="here")
    sizes = [len(sequence) for document in documents for sequence in document]
    summary = summarize(prefix)
    assert (summary.documents, summary.sequences, summary.tokens) == (20, len(sizes), sum(sizes))
    assert (summary.shortest, summary.median, summary.longest) == (min(sizes), np.median(sizes), max(sizes))
    bins = zip(summary.edges[:-1], summary.edges[1:], summary.counts, strict=True)
    assert all(sum(a <= size < b for size in sizes) == count for a, b, count in bins)
    assert sum(summary.counts) == len(sizes)
    assert summary.provenance == {"made": "here"}
    empty = summarize(build(tmp_path / "empty", []))
    assert (empty.documents, empty.longest, empty.counts.sum()) == (0, 0, 0)


def test_samples_are_decoded_by_the_right_tokenizer(tmp_path: Path) -> None:
    texts = ["one", "two", "three", "four"]
    tokenizer = {"name": "characters", "fingerprint": "0" * 64}
    prefix = build(tmp_path / "data", [[[ord(letter) for letter in text]] for text in texts], tokenizer=tokenizer)
    assert decoded_samples(prefix, CharacterTokenizer(), 9) == list(enumerate(texts))
    assert len(decoded_samples(prefix, CharacterTokenizer(), 2)) == 2
    other = CharacterTokenizer()
    other.fingerprint = "1" * 64
    with pytest.raises(
        ValueError, match=r"`tokenizer` must be the one that made .*data \(characters, fingerprint 0000"
    ):
        decoded_samples(prefix, other, 1)


def test_the_histogram_is_drawn(documents: Documents, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    prefix = build(tmp_path / "data", documents)
    plot_lengths(prefix, summarize(prefix), tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    lines = [f"line {i} {'x' * (i * 7 % 50)}" for i in range(3000)] + [""]
    (tmp_path / "a.txt").write_text("\n".join(lines[:2000]))  # no line break at the end
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in lines[2000:]).encode()))
    return lines


@pytest.mark.parametrize("memory_bytes", [1, 20_000, 1 << 28])
def test_shuffling_keeps_every_line(memory_bytes: int, lines: list[str], tmp_path: Path) -> None:
    inputs, output = [tmp_path / "a.txt", tmp_path / "b.txt.gz"], tmp_path / "out.txt"
    orders = []
    for seed in (0, 0, 1):
        count = shuffle_lines(inputs, output, seed=seed, memory_bytes=memory_bytes, overwrite=True)
        orders.append(output.read_text().removesuffix("\n").split("\n"))
        assert count == len(lines)
        assert Counter(orders[-1]) == Counter(lines)
    assert orders[0] == orders[1] != orders[2]
    # Where lines come to lie does not depend on where they were: no correlation, within 5 standard deviations.
    places = {line: place for place, line in enumerate(orders[0])}
    correlation = np.corrcoef(range(len(lines)), [places[line] for line in lines])[0, 1]
    assert abs(correlation) < 5 / len(lines) ** 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt.gz", "out.txt"]


def test_shuffling_refuses(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists; `overwrite` replaces it"):
        shuffle_lines([tmp_path / "a.txt"], tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"absent\.txt: cannot be read"):
        shuffle_lines([tmp_path / "absent.txt"], tmp_path / "out.txt")
    (tmp_path / "cut.gz").write_bytes((tmp_path / "b.txt.gz").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut\.gz: cannot be read"):
        shuffle_lines([tmp_path / "cut.gz"], tmp_path / "out.txt")
    assert not (tmp_path / "out.txt").exists()
    with pytest.raises(ValueError, match="`memory_bytes` must be at least 1"):
        shuffle_lines([tmp_path / "a.txt"], tmp_path / "out.txt", memory_bytes=0)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_shuffling_drops_the_mark_before_a_text(suffix: str, lines: list[str], tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    pack = gzip.compress if suffix else bytes
    texts = ["".join(f'{{"text": "{line}"}}\n' for line in lines).encode(), b"ab", b""]
    orders = []
    for before in (b"", mark):
        inputs = [tmp_path / f"{number}{suffix}" for number in range(len(texts))]
        for path, text in zip(inputs, texts, strict=True):
            path.write_bytes(pack(before + text))
        shuffle_lines(inputs, tmp_path / "out.txt", overwrite=True)
        orders.append((tmp_path / "out.txt").read_bytes())
    assert orders[0] == orders[1]


PEAK = """
import resource, sys
from model_center.tools import shuffle_lines
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shuffle_lines([sys.argv[1]], sys.argv[2], memory_bytes=8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_shuffling_takes_less_memory_than_its_input(tmp_path: Path) -> None:
    text = b"".join(b"%d some words that fill the line\n" % i for i in range(2_000_000))
    (tmp_path / "large.txt").write_bytes(text)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large.txt"), str(tmp_path / "out.txt")]
    kilobytes = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (tmp_path / "out.txt").stat().st_size == len(text) > 70 << 20
    assert kilobytes < 40 << 10
