"""Objectives at read time, and packing: against naive code, and what must hold for anything drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center.dataset.indexed import (
    CausalLM,
    ContextSpan,
    DistributedMMapIndexedDataset,
    FullRows,
    MaskedLM,
    MMapIndexedDataset,
    ObjectiveDataset,
    PairedDataset,
    PrefixLM,
    SpanCorruption,
    make_builder,
    pack_samples,
)

Array = np.ndarray[Any, Any]
SEQUENCES = st.lists(st.integers(10, 99), min_size=1, max_size=60).map(np.array)
SEEDS = st.integers(0, 1000)
SPECIAL = (10, 11)
CONTINUATIONS = np.arange(100) % 3 == 0


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_causal_lm_predicts_the_next_token() -> None:
    sample = CausalLM()(np.array([5, 6, 7]), random(0))
    assert sample["input_ids"].tolist() == [5, 6, 7]
    assert sample["labels"].tolist() == [6, 7, -100]


@settings(deadline=None)
@given(tokens=SEQUENCES, seed=SEEDS)
def test_prefix_lm_predicts_what_follows_the_prefix(tokens: Array, seed: int) -> None:
    sample = PrefixLM()(tokens, random(seed))
    prefix = int(sample["context"].sum())
    assert sample["context"].tolist() == [True] * prefix + [False] * (len(tokens) - prefix)
    expected = [int(tokens[i + 1]) if i + 1 >= prefix and i + 1 < len(tokens) else -100 for i in range(len(tokens))]
    assert sample["labels"].tolist() == expected
    assert 1 <= prefix <= max(1, len(tokens) - 1)


def test_the_prefix_takes_the_share_it_is_told() -> None:
    prefixes = [int(PrefixLM(0.25, 0.5)(np.arange(100), random(seed))["context"].sum()) for seed in range(200)]
    assert (min(prefixes), max(prefixes)) == (25, 50)
    with pytest.raises(ValueError, match="`shortest` and `longest` must be"):
        PrefixLM(0.6, 0.5)


@settings(deadline=None)
@given(tokens=SEQUENCES, seed=SEEDS, ended=st.booleans())
def test_context_span_follows_cpm1(tokens: Array, seed: int, ended: bool) -> None:
    tokens = np.append(tokens, 4) if ended else tokens
    sample = ContextSpan(eod_id=4)(tokens, random(seed))
    length, labels, context = len(tokens), sample["labels"], sample["context"]
    hidden = np.flatnonzero(~context)
    if not len(hidden):
        assert (labels == -100).all()
        return
    left, right = int(hidden[0]), int(hidden[-1]) + 1
    assert hidden.tolist() == list(range(left, right))
    assert max(1, length // 8) <= left <= max(1, length // 4)
    assert length // 4 * 3 <= right <= length
    assert right == length or not ended
    target = np.full(length, -100)
    target[left - 1 : right - 1] = tokens[left:right]
    assert labels.tolist() == target.tolist()


@settings(deadline=None)
@given(tokens=SEQUENCES, seed=SEEDS, whole=st.booleans())
def test_masked_lm_masks_whole_words_and_nothing_special(tokens: Array, seed: int, whole: bool) -> None:
    objective = MaskedLM(100, mask_id=1, special_ids=SPECIAL, continuations=CONTINUATIONS if whole else None)
    sample = objective(tokens, random(seed))
    masked = sample["labels"] != -100
    assert (sample["labels"][masked] == tokens[masked]).all()
    assert (sample["input_ids"][~masked] == tokens[~masked]).all()
    words: list[list[int]] = []
    for i, token in enumerate(tokens):
        if token in SPECIAL:
            assert not masked[i]
        elif whole and CONTINUATIONS[token] and i and tokens[i - 1] not in SPECIAL:
            words[-1].append(i)
        else:
            words.append([i])
    chosen = [word for word in words if masked[word].any()]
    assert all(masked[word].all() for word in chosen)
    assert len(chosen) == (max(1, round(0.15 * len(words))) if words else 0)


def test_masked_tokens_are_mostly_masks() -> None:
    tokens = np.full(100_000, 50)
    changed = MaskedLM(100, mask_id=1)(tokens, random(0))
    inputs = changed["input_ids"][changed["labels"] != -100]
    # Of 15,000: 80% masks, 10% as they were, 10% drawn from all ids; each within five standard deviations.
    assert len(inputs) == 15_000
    assert abs((inputs == 1).sum() - 12_015) < 5 * 49
    assert abs((inputs == 50).sum() - 1_515) < 5 * 37
    assert len(np.unique(inputs)) == 100
    with pytest.raises(ValueError, match="`share` must lie"):
        MaskedLM(100, 1, share=0)
    with pytest.raises(ValueError, match="`continuations` must have `vocab_size`"):
        MaskedLM(101, 1, continuations=CONTINUATIONS)


@settings(deadline=None)
@given(tokens=SEQUENCES, seed=SEEDS, share=st.floats(0.05, 0.9), mean=st.floats(1, 6))
def test_span_corruption_can_be_undone(tokens: Array, seed: int, share: float, mean: float) -> None:
    sentinels = tuple(range(199, 99, -1))
    sample = SpanCorruption(sentinels, eos_id=1, start_id=0, share=share, mean_span=mean)(tokens, random(seed))
    inputs, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    assert sample["decoder_input_ids"].tolist() == [0, *labels[:-1]]
    assert (inputs.pop(), labels.pop()) == (1, 1)
    used = [token for token in inputs if token >= 100]
    assert used == list(sentinels[: len(used)])
    assert used == [token for token in labels if token >= 100]
    spans: dict[int, list[int]] = {}
    for token in labels:
        spans[token] = [] if token >= 100 else spans[(last := [*spans][-1])]
        if token < 100:
            spans.pop(token)
            spans[last].append(token)
    restored = [part for token in inputs for part in (spans[token] if token >= 100 else [token])]
    assert restored == tokens.tolist()
    if len(tokens) > 1:
        assert sum(map(len, spans.values())) == min(max(1, round(len(tokens) * share)), len(tokens) - 1)
        assert all(spans.values())


def test_span_corruption_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="`share` must lie between 0 and 1"):
        SpanCorruption((9,), 1, 0, share=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, of documents with one or two sequences."""
    folder = tmp_path_factory.mktemp("objectives")
    numbers = random(0)
    for number in (1, 2):
        with make_builder(folder / f"t_{number}", dtype="uint16") as builder:
            for _ in range(10):
                builder.add_items(
                    [numbers.integers(20, 90, numbers.integers(0, 30)) for _ in range(numbers.integers(1, 3))]
                )
                builder.end_document()
    return folder


def test_a_sample_is_the_same_on_any_rank_and_in_any_order(folder: Path) -> None:
    objective = MaskedLM(100, mask_id=1)

    def samples(rank: int, world_size: int, shuffle: int | None, epoch: int = 0) -> dict[int, list[int]]:
        source = DistributedMMapIndexedDataset(folder, "t", rank, world_size, seed=shuffle, epoch=epoch)
        dataset = ObjectiveDataset(source, objective, seed=5, max_length=20)
        assert dataset[-1]["labels"].tolist() == dataset[len(dataset) - 1]["labels"].tolist()
        return {source.sample_number(i): sample["input_ids"].tolist() for i, sample in enumerate(dataset)}

    alone = samples(0, 1, None)
    assert samples(0, 3, 1) | samples(1, 3, 1) | samples(2, 3, 1) == alone
    assert samples(0, 1, None, epoch=1) != alone
    assert max(map(len, alone.values())) == 20
    first = MMapIndexedDataset(folder / "t_1")
    by_file = ObjectiveDataset(first, objective, seed=5, max_length=20)[0 : len(first)]
    assert [sample["input_ids"].tolist() for sample in by_file] == [alone[i] for i in range(len(first))]


@pytest.mark.parametrize("length", [1, 7, 64, 10_000])
def test_full_rows_are_the_stream_with_its_boundaries(length: int, folder: Path) -> None:
    source = MMapIndexedDataset(folder / "t_1")
    stream = [  # (token, document, place in the document)
        (int(token), document, place)
        for document, (begin, end) in enumerate(zip(source.doc_idx[:-1], source.doc_idx[1:], strict=True))
        for place, token in enumerate(np.concatenate(source[begin:end]))
    ]
    rows = FullRows(source, length, pad_id=3)
    assert len(rows) == -(-len(stream) // length)
    for i, row in enumerate(rows):
        part = stream[i * length : (i + 1) * length]
        after = [*stream[i * length + 1 : (i + 1) * length + 1], (0, -1, 0)]
        rest = length - len(part)
        assert row["input_ids"].tolist() == [token for token, _, _ in part] + [3] * rest
        expected = [then[0] if then[1] == now[1] else -100 for now, then in zip(part, after, strict=False)]
        assert row["labels"].tolist() == expected + [-100] * rest
        same = row["documents"][:, None] == row["documents"][None, :]
        owners = np.array([document for _, document, _ in part] + [-1] * rest)
        assert (same == (owners[:, None] == owners[None, :])).all()
        starts = [max(0, j - place) for j, (_, _, place) in enumerate(part)]
        assert row["position_ids"][: len(part)].tolist() == [j - start for j, start in enumerate(starts)]
    with pytest.raises(IndexError, match="must lie in"):
        rows[len(rows)]
    with pytest.raises(ValueError, match="`length` must be at least 1"):
        FullRows(source, 0)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 10), max_size=40), open_rows=st.integers(1, 5))
def test_packing_loses_and_mixes_nothing(sizes: list[int], open_rows: int) -> None:
    samples = [
        {"input_ids": np.full(size, i + 1), "labels": np.full(size, i + 1), "context": np.ones(size, dtype=bool)}
        for i, size in enumerate(sizes)
    ]
    found: dict[int, int] = {}
    rows = list(pack_samples(samples, 10, open_rows=open_rows, pad_id=0))
    for row in rows:
        assert all(len(values) == 10 for name, values in row.items() if name != "samples")
        ids = row["input_ids"]
        assert ((ids == 0) == (row["labels"] == -100)).all()
        assert ((ids != 0) == row["context"]).all()
        present = [int(number) for number in dict.fromkeys(ids.tolist()) if number]
        assert row["samples"].tolist() == [len(present)]
        for document, number in enumerate(present):
            assert ((ids == number) == (row["documents"] == document)).all()
            assert row["position_ids"][ids == number].tolist() == list(range(sizes[number - 1]))
            found[number] = int((ids == number).sum())
    assert found == {i + 1: size for i, size in enumerate(sizes)}
    if open_rows == 5 and sizes and max(sizes) <= 5:
        assert len(rows) <= 2 * -(-sum(sizes) // 10)


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at most `length`"):
        list(pack_samples([{"input_ids": np.zeros(11), "labels": np.zeros(11)}], 10))
    with pytest.raises(ValueError, match="must have one length"):
        list(pack_samples([{"input_ids": np.zeros(3), "labels": np.zeros(2)}], 10))


def test_pairs_are_padded_as_cpm_does() -> None:
    inputs, targets = [np.array([5, 26250, 7])], [np.array([26240, 9])]
    cpm2 = PairedDataset(inputs, targets, max_length=4, max_target_length=3, moved_ids=(26240, 190))
    (sample,) = cpm2[:]
    assert sample["input_ids"].tolist() == [5, 26060, 7, 0]
    assert sample["labels"].tolist() == [26050, 9, -100]
    assert (int(sample["length"]), int(sample["target_length"])) == (3, 2)
    cpm1 = PairedDataset(inputs, inputs, max_length=2)
    assert cpm1[0]["labels"].tolist() == [5, 26250]
    with pytest.raises(ValueError, match="targets must be as long as inputs"):
        PairedDataset(inputs, targets, max_length=4)[0]
    with pytest.raises(ValueError, match="as many sequences"):
        PairedDataset(inputs, [], max_length=4)
