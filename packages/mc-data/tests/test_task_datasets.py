"""Items of every family, compared with what a reader of the task's texts would write down by hand."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import END, PAD, SENTINEL, SEPARATOR, START, PlainTokenizer, ToyTokenizer, write_rows

from model_center.dataset import bertdataset, cpm1dataset, cpm2dataset, gpt2dataset, gptjdataset, t5dataset
from model_center.dataset.bertdataset import BertDataset
from model_center.dataset.cpm2dataset import CPM2Dataset
from model_center.dataset.gpt2dataset import GPT2Dataset
from model_center.dataset.t5dataset import T5Dataset
from model_center.dataset.tasks import TASKS, Prompt, Task

BOOLQ: dict[str, Any] = {"passage": "one two three four", "question": "is it five", "label": True}
COPA = {"premise": "it rained", "choice1": "wet", "choice2": "dry", "question": "effect", "label": 0}
LCQMC = {"text_a": "甲 乙", "text_b": "丙", "label": 1}
RECORD = {
    "passage": {"text": "Ada met Bob", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]},
    "qas": [{"query": "@placeholder met Bob", "answers": [{"text": "Ada Byron"}, {"text": "Ada"}]}],
}


class CPMTokenizer(PlainTokenizer):
    """With the special tokens that CPM's vocabularies hold."""

    unk_id = 99

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<s>": START, "<s_0>": SENTINEL}.get(token, self.unk_id)


def split(row: dict[str, Any], name: str = "train") -> dict[str, list[dict[str, Any]]]:
    return {name: [row]}


def plain(item: dict[str, torch.Tensor]) -> dict[str, Any]:
    assert all(value.dtype in (torch.int64, torch.bool) for value in item.values())
    return {name: value.tolist() for name, value in item.items()}


def test_bert_reads_two_segments() -> None:
    tokenizer = ToyTokenizer()
    dataset = bertdataset.DATASET["BoolQ"](split(BOOLQ), "train", 0, 1, tokenizer)
    passage, question = tokenizer.encode(BOOLQ["passage"]), tokenizer.encode(BOOLQ["question"])
    assert plain(dataset[0]) == {
        "input_ids": [START, *passage, SEPARATOR, *question, SEPARATOR],
        "attention_mask": [1] * 10,
        "token_type_ids": [0] * 6 + [1] * 4,
        "labels": 1,
    }
    assert dataset.labels == [1]
    assert dataset.verbalizer.tolist() == [tokenizer.ids["No"], tokenizer.ids["Yes"]]


def test_bert_reads_each_choice_by_itself() -> None:
    tokenizer = ToyTokenizer()
    dataset = bertdataset.DATASET["COPA"](split(COPA), "train", 0, 1, tokenizer)
    assert len(dataset) == 1
    item = plain(dataset[0])
    asked = tokenizer.encode('The effect of "it rained"')
    for choice, text in enumerate(["wet", "dry"]):
        expected = [START, *tokenizer.encode(text), SEPARATOR, *asked, SEPARATOR]
        assert item[f"input_ids{choice}"] == expected
        assert item[f"attention_mask{choice}"] == [1] * len(expected)
        assert item[f"token_type_ids{choice}"] == [0] * 3 + [1] * (len(expected) - 3)
    assert item["labels"] == 0


def test_gpt2_reads_up_to_the_answer() -> None:
    tokenizer = ToyTokenizer()
    dataset = gpt2dataset.DATASET["BoolQ"](split(BOOLQ), "train", 0, 1, tokenizer)
    ids = tokenizer.encode("one two three four. is it five?")
    assert plain(dataset[0]) == {
        "input_ids": ids,
        "input_length": 9,
        "targets": [*ids[1:], -100],
        "index": [0] * 8 + [1],
        "labels": 1,
    }


def test_gptj_reads_as_gpt2_but_its_own_prompts() -> None:
    items = [
        plain(module.DATASET["BoolQ"](split(BOOLQ), "train", 0, 1, ToyTokenizer())[0])
        for module in (gpt2dataset, gptjdataset)
    ]
    assert items[0] == items[1]
    task = replace(TASKS["BoolQ"], prompts={"gptj": Prompt("{question}{mask}", ("no", "yes"))})
    dataset = gptjdataset.GPTjDataset(split(BOOLQ), "train", 0, 1, ToyTokenizer(), task=task)
    assert plain(dataset[0])["input_length"] == 3


def test_t5_reads_a_sentinel_in_the_place_of_the_answer() -> None:
    tokenizer = ToyTokenizer()
    dataset = t5dataset.DATASET["BoolQ"](split(BOOLQ), "train", 0, 1, tokenizer)
    before, behind = tokenizer.encode("one two three four. is it five?"), tokenizer.encode(".")
    assert plain(dataset[0]) == {
        "enc_input": [*before, SENTINEL, *behind, END],
        "enc_length": 12,
        "dec_input": [PAD, SENTINEL],
        "dec_length": 2,
        "targets": 1,
        "index": [0, 1],
    }


def test_cpm_reads_chinese_prompts() -> None:
    tokenizer = CPMTokenizer()
    one = cpm1dataset.DATASET["LCQMC"](split(LCQMC), "train", 0, 1, tokenizer)
    before, behind = tokenizer.encode('"甲 乙"与"丙"的关系是:'), tokenizer.encode("。")
    length = len(before) + 3
    assert plain(one[0]) == {
        "input_tokens": [START, *before, PAD, *behind],
        "input_length": length,
        "input_context": [True] * (length - 2) + [False, True],
        "input_span": [0] * length,
        "targets": 1,
        "index": [0] * (length - 3) + [1, 0, 0],
    }
    two = cpm2dataset.DATASET["LCQMC"](split(LCQMC), "train", 0, 1, tokenizer)
    enc_input = [*tokenizer.encode("“甲 乙”与“丙”是否有关？"), SENTINEL]
    assert plain(two[0]) == {
        "enc_input": enc_input,
        "enc_length": len(enc_input),
        "dec_input": [SENTINEL],
        "dec_length": 1,
        "targets": 1,
        "index": [1],
    }


def test_free_text_answers_follow_the_prompt() -> None:
    tokenizer = ToyTokenizer()
    prompt = tokenizer.encode("Ada met Bob Entities: Ada, Bob. Query: @placeholder met Bob What is @placeholder?")
    answer = [*tokenizer.encode("Ada Byron"), END]
    decoder = gpt2dataset.DATASET["ReCoRD"](split(RECORD), "train", 0, 1, tokenizer)
    item = plain(decoder[0])
    assert item["input_ids"] == prompt + answer
    predicted = [position for position, marked in enumerate(item["index"]) if marked]
    assert [item["targets"][position] for position in predicted] == answer
    assert "labels" not in item
    assert decoder.answers == [["Ada Byron", "Ada"]]
    assert decoder.labels is None

    seq2seq = t5dataset.DATASET["ReCoRD"](split(RECORD), "train", 0, 1, tokenizer)
    item = plain(seq2seq[0])
    assert item["enc_input"] == [*prompt, SENTINEL, *tokenizer.encode("."), END]
    assert item["dec_input"] == [PAD, SENTINEL, *answer[:-1]]
    assert item["targets"] == [-100, *answer]
    assert item["index"] == [0, 1, 1, 1]
    short = t5dataset.DATASET["ReCoRD"](split(RECORD), "train", 0, 1, tokenizer, 512, 3)
    assert plain(short[0])["targets"] == [-100, *answer[:2]]

    task = Task(name="Q", fields={"q": "q"}, answers="a", prompt=Prompt("{q}{mask}"))
    item = plain(CPM2Dataset(split({"q": "谁", "a": ["她"]}), "train", 0, 1, chinese := CPMTokenizer(), task=task)[0])
    assert item["dec_input"] == [SENTINEL, *chinese.encode("她")]
    assert item["targets"] == [*chinese.encode("她"), END]
    assert item["index"] == [1, 1]

    unanswered = {**RECORD, "qas": [{"query": "@placeholder met Bob"}]}
    for family, name in ((gpt2dataset, "input_ids"), (t5dataset, "enc_input")):
        item = plain(family.DATASET["ReCoRD"](split(unanswered, "test"), "test", 0, 1, tokenizer)[0])
        assert (
            item[name]
            == plain(family.DATASET["ReCoRD"](split(RECORD), "train", 0, 1, tokenizer)[0])[name][: len(item[name])]
        )
        assert sum(item["index"]) == 1


@pytest.mark.parametrize("dataset", [gpt2dataset.GPT2Dataset, gptjdataset.GPTjDataset])
def test_a_long_prompt_does_not_tell_how_long_its_answer_is(dataset: type[gpt2dataset.GPT2Dataset]) -> None:
    """Outside of training the same room is left for each; what an answer has beyond the limit is not predicted."""
    task = Task(name="Q", fields={"q": "q"}, answers="a", prompt=Prompt("{q}{mask}"), flexible="q")
    question = " ".join(map(str, range(30)))
    rows = [{"q": question, "a": ["x " * length]} for length in (1, 5, 9)]
    splits: dict[str, list[dict[str, Any]]] = {"train": rows, "val": rows, "test": [{"q": question}]}
    tokenizer = ToyTokenizer()
    items = {}
    for split_name, of_split in splits.items():
        read = dataset(splits, split_name, 0, 1, tokenizer, 20, 6, task=task)
        items[split_name] = [plain(read[number]) for number in range(len(of_split))]
    prompts = {name: [item["index"].index(1) + 1 for item in made] for name, made in items.items()}
    assert prompts == {"train": [18, 14, 10], "val": [14, 14, 14], "test": [14]}
    held_out = items["val"]
    assert [item["input_length"] for item in held_out] == [16, 20, 20]
    assert [sum(item["index"]) for item in held_out] == [2, 6, 6]
    assert held_out[2]["input_ids"][14:] == tokenizer.encode("x " * 6)
    with pytest.raises(ValueError, match=r"`max_decoder_length` must be above `max_answer_length` \(20\)"):
        dataset(splits, "dev", 0, 1, tokenizer, 20, 20, task=task)


def test_an_empty_answer_is_its_end_alone() -> None:
    task = Task(name="Q", fields={"q": "q"}, answers="a", prompt=Prompt("{q}{mask}"))
    rows = {"train": [{"q": "who", "a": [""]}, {"q": "who", "a": ["Ada"]}]}
    tokenizer = ToyTokenizer()
    dataset = T5Dataset(rows, "train", 0, 1, tokenizer, task=task)
    empty, named = plain(dataset[0]), plain(dataset[1])
    assert empty["dec_input"] == [PAD, SENTINEL]
    assert empty["targets"] == [-100, END]
    assert named["targets"] == [-100, *tokenizer.encode("Ada"), END]


def test_prompts_of_choices_come_in_both_orders_in_training_only() -> None:
    rows = {"train": [COPA], "val": [COPA]}
    training = gpt2dataset.DATASET["COPA"](rows, "train", 0, 1, tokenizer := ToyTokenizer())
    texts = [tokenizer.decode(item["input_ids"].tolist()) for item in (training[0], training[1])]
    assert texts[0].startswith("Choice 1 : wet Choice 2 : dry")
    assert texts[1].startswith("Choice 1 : dry Choice 2 : wet")
    assert training.labels == [0, 1]
    assert len(gpt2dataset.DATASET["COPA"](rows, "dev", 0, 1, tokenizer)) == 1


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 6), st.integers(8, 40), st.booleans())
def test_only_the_passage_is_shortened(words: int, asked: int, limit: int, plain_tokenizer: bool) -> None:
    passage = [f"p{number}" for number in range(words)]
    question = [f"q{number}" for number in range(asked)]
    rows = split({"passage": " ".join(passage), "question": " ".join(question), "label": False})
    tokenizer = ToyTokenizer()
    families: list[tuple[Any, str, list[str], list[str], int]] = [
        (gpt2dataset.DATASET, "input_ids", [], [".", *question, "?"], limit),
        (t5dataset.DATASET, "enc_input", [], [".", *question, "?", f"<{SENTINEL}>", ".", f"<{END}>"], limit),
    ]
    if plain_tokenizer:
        tokenizer.is_fast = False
    else:
        end = f"<{SEPARATOR}>"
        families.append((bertdataset.DATASET, "input_ids", [f"<{START}>"], [end, *question, end], limit))
    for registry, name, head, tail, length in families:
        room = length - len(head) - len(tail)
        if room < 0:
            with pytest.raises(ValueError, match=f"BoolQ train, row 0: the text is {-room} tokens too long"):
                registry["BoolQ"](rows, "train", 0, 1, tokenizer, length)
            continue
        ids = registry["BoolQ"](rows, "train", 0, 1, tokenizer, length)[0][name].tolist()
        kept = passage[:room] if registry is bertdataset.DATASET else passage[max(words - room, 0) :]
        assert tokenizer.decode(ids).split() == [*head, *kept, *tail]


def test_padding_by_batch_and_to_the_maximum() -> None:
    rows = {"train": [BOOLQ, {**BOOLQ, "passage": "one"}]}
    tokenizer = ToyTokenizer()
    dataset = bertdataset.DATASET["BoolQ"](rows, "train", 0, 1, tokenizer)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 10)
    assert batch["input_ids"][1].tolist() == [*dataset[1]["input_ids"].tolist(), PAD, PAD, PAD]
    assert batch["attention_mask"].tolist() == [[1] * 10, [1] * 7 + [0] * 3]
    assert batch["labels"].tolist() == [1, 1]

    fixed = t5dataset.DATASET["BoolQ"](rows, "train", 0, 1, tokenizer, 20, 8, padding="max_length")
    assert fixed[1]["enc_input"].shape == (20,)
    assert fixed[1]["index"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert torch.utils.data.default_collate([fixed[0], fixed[1]])["enc_input"].shape == (2, 20)
    assert fixed.collate([fixed[0]])["dec_input"].shape == (1, 8)


def test_data_sets_travel_to_other_processes() -> None:
    dataset = bertdataset.DATASET["COPA"](split(COPA), "train", 0, 1, ToyTokenizer())
    again = pickle.loads(pickle.dumps(dataset))
    assert plain(again[0]) == plain(dataset[0])
    assert again.task == dataset.task


def test_unlabelled_rows_have_no_label_entry(tmp_path: Path) -> None:
    row = {name: BOOLQ[name] for name in ("passage", "question")}
    write_rows(tmp_path, "BoolQ", "test.jsonl", json.dumps(row))
    for family in (bertdataset, gpt2dataset, t5dataset):
        dataset = family.DATASET["BoolQ"](tmp_path, "test", 0, 1, ToyTokenizer())
        assert {"labels", "targets"} & set(dataset[0]) <= ({"targets"} if family is gpt2dataset else set())
        assert dataset.labels is None


def test_a_task_of_ones_own_serves_all_families(tmp_path: Path) -> None:
    definition = tmp_path / "mood.yaml"
    definition.write_text(
        'name: Mood\nfields: [text]\nlabels: [sad, glad]\ninputs: "{text}"\n'
        'prompt: {template: "{text} I am {mask}.", words: [sad, glad]}\n'
    )
    task = Task.from_yaml(definition)
    write_rows(tmp_path, "Mood", "train.jsonl", '{"text": "what a day", "label": "glad"}')
    tokenizer = ToyTokenizer()
    encoder = BertDataset(tmp_path, "train", 0, 1, tokenizer, task=task)
    assert encoder[0]["input_ids"].tolist() == [START, *tokenizer.encode("what a day"), SEPARATOR]
    decoder = GPT2Dataset(tmp_path, "train", 0, 1, tokenizer, task=task)
    assert decoder[0]["input_ids"].tolist() == tokenizer.encode("what a day I am")
    assert decoder.verbalizer.tolist() == [tokenizer.ids["sad"], tokenizer.ids["glad"]]
    assert T5Dataset(tmp_path, "train", 0, 1, tokenizer, task=task).labels == [1]


class NoSpecialTokens(ToyTokenizer):
    cls_token_id = None


class Silent(ToyTokenizer):
    """A tokenizer that has special tokens but does not put them around a text."""

    def __call__(self, *texts: Any, **options: Any) -> dict[str, Any]:
        return super().__call__(*texts, **{**options, "add_special_tokens": False})


class NoSentinels(ToyTokenizer):
    def convert_tokens_to_ids(self, token: str) -> int:
        return self.unk_token_id


def test_arguments_that_do_not_fit() -> None:
    def boolq(family: Any = bertdataset, tokenizer: Any = None, **options: Any) -> Any:
        return family.DATASET["BoolQ"](split(BOOLQ), "train", 0, 1, tokenizer or ToyTokenizer(), **options)

    with pytest.raises(ValueError, match=r"no task 'MNLI' here: known are BoolQ, CB, COPA"):
        bertdataset.DATASET["MNLI"]
    assert "MNLI" not in bertdataset.DATASET
    assert set(gpt2dataset.DATASET) == {"BoolQ", "CB", "COPA", "RTE", "WiC", "WSC", "MultiRC", "ReCoRD"}
    assert list(gptjdataset.DATASET) == list(gpt2dataset.DATASET)
    assert set(t5dataset.DATASET) == {*gpt2dataset.DATASET, "SQuAD"}
    assert list(cpm1dataset.DATASET) == list(cpm2dataset.DATASET) == ["LCQMC"]
    with pytest.raises(ValueError, match="tokenizer 'toy' has no cls_token: the vocabulary lacks"):
        boolq(tokenizer=NoSpecialTokens())
    with pytest.raises(ValueError, match="does not put special tokens around 2 segments"):
        boolq(tokenizer=Silent())
    with pytest.raises(ValueError, match="tokenizer 'toy' has no <extra_id_0>: the vocabulary lacks"):
        boolq(t5dataset, tokenizer=NoSentinels())
    with pytest.raises(ValueError, match="encoders need one of Transformers' fast tokenizers, but got tokenizer 'toy'"):
        boolq(tokenizer=PlainTokenizer())
    with pytest.raises(ValueError, match="`max_encoder_length` must be positive, but is 0"):
        boolq(max_encoder_length=0)
    with pytest.raises(ValueError, match="`max_decoder_length` must be at least 2, but is 1"):
        boolq(t5dataset, max_decoder_length=1)
    with pytest.raises(ValueError, match="`padding` must be 'batch' or 'max_length', but is 'longest'"):
        boolq(padding="longest")
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, world_size = 1\), but is 1"):
        bertdataset.DATASET["BoolQ"](split(BOOLQ), "train", 1, 1, ToyTokenizer())
    with pytest.raises(ValueError, match="BertDataset reads tasks with labels, but 'ReCoRD' has `answers`"):
        BertDataset(split(RECORD), "train", 0, 1, ToyTokenizer(), task=TASKS["ReCoRD"])
    task = replace(TASKS["BoolQ"], prompt=Prompt("{passage}{mask}", ("not so", "yes")))
    with pytest.raises(ValueError, match="the word 'not so' of task 'BoolQ' is 2 tokens, but must be one"):
        _ = BertDataset(split(BOOLQ), "train", 0, 1, ToyTokenizer(), task=task).verbalizer
    task = replace(TASKS["BoolQ"], prompt=Prompt("{passage}{mask}", ("yes", "yes")))
    with pytest.raises(ValueError, match=r"words of task 'BoolQ', yes, yes, must differ, .* for tokenizer 'toy'"):
        _ = BertDataset(split(BOOLQ), "train", 0, 1, ToyTokenizer(), task=task).verbalizer
    with pytest.raises(ValueError, match="task 'ReCoRD' is answered with free text"):
        _ = GPT2Dataset(split(RECORD), "train", 0, 1, ToyTokenizer(), task=TASKS["ReCoRD"]).verbalizer
