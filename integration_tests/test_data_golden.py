"""Task data sets against the records of ModelCenter 0.1.0, with real vocabularies.

`DIFFERENCES` lists every entry in which ours are meant to differ, and why; all others must be equal.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_center.dataset import bertdataset, cpm1dataset, cpm2dataset, gpt2dataset, t5dataset
from model_center.tokenizer import BertTokenizer, CPM1Tokenizer, CPM2Tokenizer, GPT2Tokenizer, T5Tokenizer

FAMILIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "bert": (bertdataset, (64,)),
    "gpt2": (gpt2dataset, (160,)),
    "t5": (t5dataset, (160, 8)),
    "cpm1": (cpm1dataset, (128,)),
    "cpm2": (cpm2dataset, (128, 8)),
}
TASKS = ("BoolQ", "CB", "COPA", "RTE", "WiC", "WSC")

QUESTION_LOST = "the original cut the end of the text, and with it the question; ours shortens the passage"
BEGINNING_LOST = "the original cut the beginning of the prompt ('Sentence 1:'); ours shortens the first sentence"
LENGTH_BEFORE = "the original gave the length before cutting, which is more than the tokens there are"

DIFFERENCES: dict[tuple[str, int], tuple[set[str], str]] = {
    **{("bert/BoolQ/dev", row): ({"input_ids", "token_type_ids"}, QUESTION_LOST) for row in range(4)},
    ("bert/WSC/dev", 1): ({"input_ids"}, QUESTION_LOST),
    ("gpt2/RTE/dev", 2): ({"input_ids", "targets"}, BEGINNING_LOST),
    ("t5/RTE/dev", 2): ({"enc_input", "enc_length"}, BEGINNING_LOST + "; " + LENGTH_BEFORE),
    ("t5/RTE/dev", 3): ({"enc_input", "enc_length"}, BEGINNING_LOST + "; " + LENGTH_BEFORE),
    ("t5/BoolQ/dev", 0): ({"enc_length"}, LENGTH_BEFORE),
    ("t5/BoolQ/dev", 1): ({"enc_length"}, LENGTH_BEFORE),
}
VERBALIZERS: dict[str, tuple[list[str], str]] = {
    **{f"bert/{task}/verbalizer": (["no", "yes"], "the original took [CLS] for each word") for task in TASKS},
    "cpm2/LCQMC/verbalizer": (["否", "是"], "the original had ids written in, of a vocabulary with two more tokens"),
}


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> dict[str, Any]:
    return dict(json.loads((shared_dir / "golden" / "datasets.json").read_text()))


@pytest.fixture(scope="module")
def build(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Any]:
    """Makes the data set of a family, task and split from the first twelve rows, as the records were made."""
    configs = shared_dir / "data" / "modelcenter_configs"
    tokenizers = {
        "bert": BertTokenizer.from_pretrained(configs / "bert" / "bert-base-uncased"),
        "gpt2": GPT2Tokenizer.from_pretrained(configs / "gpt2" / "gpt2-base"),
        "t5": T5Tokenizer.from_pretrained(configs / "t5" / "t5-small"),
        "cpm1": CPM1Tokenizer(configs / "cpm1" / "cpm1-large" / "vocab.txt"),
        "cpm2": CPM2Tokenizer(configs / "cpm2" / "cpm2-large" / "vocab.txt", space_token="▂", line_token="▃"),
    }
    folder = tmp_path_factory.mktemp("data")
    superglue = shared_dir / "data" / "superglue"
    files = {
        f"{task}/{split}.jsonl": superglue / task / f"{split}.jsonl" for task in TASKS for split in ("train", "val")
    }
    files["LCQMC/train.tsv"] = shared_dir / "data" / "LCQMC" / "dev.tsv"
    for name, source in files.items():
        header = name.startswith("LCQMC")
        (folder / name).parent.mkdir(exist_ok=True)
        with source.open(encoding="utf-8") as lines:
            (folder / name).write_text("".join(itertools.islice(lines, 12 + header)), encoding="utf-8")

    def make(family: str, task: str, split: str) -> Any:
        module, limits = FAMILIES[family]
        return module.DATASET[task](folder, split, 0, 1, tokenizers[family], *limits, padding="max_length")

    return make


def test_items_equal_the_records_but_for_the_listed_differences(
    golden: dict[str, Any], build: Callable[[str, str, str], Any]
) -> None:
    compared = 0
    for key, items in golden.items():
        if key.endswith(("/len", "/verbalizer")):
            continue
        family, task, *split = key.split("/")
        dataset = build(family, task, split[0] if split else "train")
        for row, expected in enumerate(items):
            found = {name: value.tolist() for name, value in dataset[row].items()}
            assert set(found) == set(expected)
            differing = {name for name in expected if found[name] != expected[name]}
            assert differing == DIFFERENCES.get((key, row), (set(), ""))[0], f"{key} row {row}"
            compared += 1
    assert compared == 80


def test_what_the_original_cut_off_is_still_there(build: Callable[[str, str, str], Any]) -> None:
    for (key, row), (entries, reason) in DIFFERENCES.items():
        family, task, split = key.split("/")
        dataset = build(family, task, split)
        name = "enc_input" if family == "t5" else "input_ids"
        if name not in entries:
            assert dataset[row]["enc_length"] == len(dataset[row][name]), reason
            continue
        text = dataset.tokenizer.decode(dataset[row][name])
        # Rows of these splits, in the words of their files.
        ends = {
            "bert/BoolQ/dev": ("[CLS]", "[SEP]"),
            "bert/WSC/dev": ("[CLS] mr. moncrieff", "refers to mr. moncrieff? [SEP]"),
            "gpt2/RTE/dev": ("Sentence 1:", "Does sentence 1 entails sentence 2?"),
            "t5/RTE/dev": ("Sentence 1:", "Does sentence 1 entails sentence 2?<extra_id_0> .</s>"),
        }[key]
        assert text.startswith(ends[0]), reason
        assert text.endswith(ends[1]), reason
    questions = [
        "does ethanol take more energy make that produces",
        "is house tax and property tax are same",
        "is pain experienced in a missing body part or paralyzed area",
        "is harry potter and the escape from gringotts a roller coaster ride",
    ]
    dataset = build("bert", "BoolQ", "dev")
    for row, question in enumerate(questions):
        assert f"[SEP] {question} [SEP]" in dataset.tokenizer.decode(dataset[row]["input_ids"])


def test_lengths_and_verbalizers_equal_the_records(
    golden: dict[str, Any], build: Callable[[str, str, str], Any]
) -> None:
    for key, expected in golden.items():
        family, task, *rest = key.split("/")
        if rest and rest[-1] == "len":
            assert len(build(family, task, rest[0])) == expected, key
        elif rest and rest[-1] == "verbalizer":
            dataset = build(family, task, "train")
            found = dataset.verbalizer.tolist()
            words, reason = VERBALIZERS.get(key, ([], ""))
            if not words:
                assert found == expected, key
            else:
                assert found != expected, reason
                assert dataset.tokenizer.convert_ids_to_tokens(found) == words, reason
