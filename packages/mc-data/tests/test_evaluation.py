"""Scores against counting by hand, and over processes."""

import multiprocessing
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import ToyTokenizer

from model_center.dataset import DistributedDataLoader, bertdataset, t5dataset
from model_center.dataset.evaluation import (
    Evaluator,
    accuracy,
    binary_f1,
    exact_match,
    group_exact_match,
    macro_f1,
    token_f1,
)

CLASSES = ("contradiction", "entailment", "neutral")
LABELS = [0, 1, 2, 1, 1, 0, 2]
ROWS = [{"premise": f"p{n}", "hypothesis": f"h{n}", "label": CLASSES[label]} for n, label in enumerate(LABELS)]
GUESSES = [0, 1, 1, 1, 0, 0, 0]


def cb() -> bertdataset.BertDataset:
    return bertdataset.DATASET["CB"]({"dev": ROWS}, "dev", 0, 1, ToyTokenizer())


def f1(predictions: list[int], labels: list[int], wanted: int) -> float:
    """F1 of one class, from its definition."""
    pairs = list(zip(predictions, labels, strict=True))
    right = sum(prediction == label == wanted for prediction, label in pairs)
    predicted, present = predictions.count(wanted), labels.count(wanted)
    return 2 * right / (predicted + present) if predicted + present else 0.0


classes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20)


@settings(deadline=None)
@given(classes)
def test_class_scores(pairs: list[tuple[int, int]]) -> None:
    predictions, labels = map(list, zip(*pairs, strict=True))
    assert accuracy(predictions, labels) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert macro_f1(predictions, labels, 3) == pytest.approx(sum(f1(predictions, labels, n) for n in range(3)) / 3)
    binary = [min(value, 1) for value in predictions], [min(value, 1) for value in labels]
    assert binary_f1(*binary) == pytest.approx(f1(*binary, 1))


def test_text_scores() -> None:
    predictions = ["The Denver Broncos!", "Santa Clara", "", "gold"]
    answers = [["Denver Broncos"], ["Levi's", "in Santa Clara, California"], ["nothing"], ["golden", "Gold."]]
    assert exact_match(predictions, answers) == 2 / 4
    assert token_f1(predictions, answers) == pytest.approx((1 + 2 * 2 / (2 + 4) + 0 + 1) / 4)


def test_a_group_counts_when_all_of_it_is_right() -> None:
    assert group_exact_match([1, 0, 1, 1], [1, 0, 1, 0], ["a", "a", "b", "b"]) == 1 / 2


def test_official_measures_of_the_tasks() -> None:
    dataset = cb()
    loader = DistributedDataLoader(dataset, 3, shuffle=True, bucket_by_length=True)
    evaluator = Evaluator(loader.dataset)
    for _ in range(2):  # rows that come again count once
        for batch in loader:
            evaluator.add(loader.batch_indices, torch.tensor([GUESSES[row] for row in loader.batch_indices]))
            assert len(batch["labels"]) == len(loader.batch_indices)
    assert evaluator.compute() == {
        "accuracy": pytest.approx(4 / 7),
        "macro_f1": pytest.approx(sum(f1(GUESSES, LABELS, n) for n in range(3)) / 3),
    }

    answers = [{"text": "one", "label": 1}, {"text": "two", "label": 0}]
    questions = [{"question": f"q{n}", "idx": n, "answers": answers} for n in range(2)]
    rows = {"dev": [{"idx": 0, "passage": {"text": "p", "questions": questions}}]}
    evaluator = Evaluator(t5dataset.DATASET["MultiRC"](rows, "dev", 0, 1, ToyTokenizer()))
    evaluator.add([0, 1, 2, 3], [1, 0, 1, 1])
    assert evaluator.compute() == {"binary_f1": pytest.approx(2 * 2 / (3 + 2)), "group_exact_match": 0.5}

    rows = {"dev": [{"context": "c", "question": "q", "answers": {"text": ["Ada", "Ada Byron"]}}]}
    evaluator = Evaluator(t5dataset.DATASET["SQuAD"](rows, "dev", 0, 1, ToyTokenizer()))
    evaluator.add([0], ["the Ada Lovelace"])
    assert evaluator.compute() == {"exact_match": 0.0, "token_f1": pytest.approx(2 / 3)}


def test_scores_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(cb())
    with pytest.raises(ValueError, match="there are no predictions to score"):
        evaluator.compute()
    with pytest.raises(ValueError, match="there are 1 predictions for 2 rows"):
        evaluator.add([0, 1], [1])
    evaluator.add([0, 1], [0, 1])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes, but torch.distributed is not initialised: give `gather`"):
        evaluator.compute()
    other = torch.tensor(list(b"[[2, 0]]\n"), dtype=torch.int32)
    assert evaluator.compute(gather=lambda mine: torch.cat([mine, other]))["accuracy"] == pytest.approx(2 / 3)
    bare = [{name: text for name, text in row.items() if name != "label"} for row in ROWS]
    unlabelled = bertdataset.DATASET["CB"]({"test": bare}, "test", 0, 1, ToyTokenizer())
    with pytest.raises(ValueError, match="split 'test' of CB has no labels to compare with"):
        Evaluator(unlabelled)


def _evaluate(rank: int, store: Path, results: "Queue[Any]") -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loader = DistributedDataLoader(cb(), 2)
    evaluator = Evaluator(loader.dataset)
    for _ in loader:
        evaluator.add(loader.batch_indices, [GUESSES[row] for row in loader.batch_indices])
    results.put(evaluator.compute())
    torch.distributed.destroy_process_group()


def test_processes_put_their_predictions_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Queue[Any] = context.Queue()
    processes = [
        context.Process(target=_evaluate, args=(rank, tmp_path / "store", results), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    one, other = (results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert one == other
    assert one["accuracy"] == pytest.approx(4 / 7)
