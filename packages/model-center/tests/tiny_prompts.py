"""Tiny random models of the families that answer prompts, with their tokenizers, and tiny tasks that they can learn."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_encoder import WORDS as ENCODER_WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from model_center.model import families

PHRASES = {"sun": "day", "moon": "long night", "tree": "green wood here", "river": "sea"}
"""Answers of one to three words, by the word that a text holds."""
RIDDLE = """
name: Riddle
fields: [text]
answers: answers
prompt: {template: "{text} Answer:{mask}."}
flexible: text
metrics: [exact_match, token_f1]
"""
"""A task that is answered in free text."""
WORDS = sorted(
    {*ENCODER_WORDS, *" ".join(PHRASES.values()).split(), *["Yes", "No", "Maybe", "Question:", "Answer:", "what?"]}
)
CPM_TOKENS = ["<s>", "<eod>", "<pad>", "<unk>", "</n>", "</_>", *(f"<s_{number}>" for number in range(190))]
CPM_TOKENS += [*'日月树河石鸟好坏与的关系是:。否“”？"', "无关", "有关", "是否", "关系"]
SIZES: dict[str, Any] = {"dim_model": 32, "num_heads": 2, "dim_head": 16, "dim_ff": 64, "dropout_p": 0.0}
STACK = {"num_layers": 2, "att_init_std": 0.1, "ffn_init_std": 0.1, "emb_init_std": 0.3}
STACKS = {"num_encoder_layers": 1, "num_decoder_layers": 1, "pos_init_std": 0.1, **STACK}
del STACKS["num_layers"]
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {**STACK, "position_size": 64, "att_dropout_p": 0.0},
    "gptj": {**STACK, "pos_rotary_dim": 8, "proj_init_std": 0.1},
    "t5": {**STACKS, "proj_init_std": 0.1},
    "cpm1": {**STACK, "pos_init_std": 0.1, "tied": True},
    "cpm2": {**STACKS, "proj_init_std": 0.1},
}


def write_model(directory: Path, family: str, **changes: Any) -> Path:
    """Write a random model and its tokenizer; `changes` are options of its config."""
    directory.mkdir(parents=True)
    size = _TOKENIZERS[family](directory)
    torch.manual_seed(0)
    config_class = families[family].config_class
    config = config_class(**{"vocab_size": size, **SIZES, **OPTIONS[family], **changes})
    families[family](config).save_pretrained(directory)
    return directory


def _write_unigrams(directory: Path) -> int:
    """T5's: a token of every word of the tasks, and of every character."""
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(100))]
    letters = sorted({letter for word in WORDS for letter in word} | {"\u2581"})
    pieces = [*special, *(f"\u2581{word}" for word in WORDS), *letters]
    scores = [0.0 if piece in special else -float(len(letters) if piece in letters else 1) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    return len(pieces)


def _write_byte_pairs(directory: Path) -> int:
    """GPT-2's and GPT-J's, trained on the words of the tasks; the model has one more id, for padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(["", *WORDS])] * 5, trainer)
    tokenizer.model.save(str(directory))
    return tokenizer.get_vocab_size() + 1


def _write_cpm(directory: Path) -> int:
    (directory / "vocab.txt").write_text("\n".join(CPM_TOKENS) + "\n", encoding="utf-8")
    return len(CPM_TOKENS)


_TOKENIZERS = {
    "gpt2": _write_byte_pairs,
    "gptj": _write_byte_pairs,
    "t5": _write_unigrams,
    "cpm1": _write_cpm,
    "cpm2": _write_cpm,
}


def write_prompt_task(directory: Path, task: str, train: int = 96, dev: int = 32) -> Path:
    """Write both splits of LCQMC, SQuAD or Riddle (`RIDDLE`), as `write_model`'s models can learn them."""
    (directory / task).mkdir(parents=True)
    for split, count, seed in (("train", train, 1), ("dev", dev, 2)):
        if task == "LCQMC":
            text = "text_a\ttext_b\tlabel\n" + "".join(f"{a}\t{b}\t{label}\n" for a, b, label in _lcqmc(count, seed))
            (directory / task / f"{split}.tsv").write_text(text, encoding="utf-8")
        elif task == "SQuAD":
            paragraphs = [
                {"context": text, "qas": [{"id": "0", "question": "what?", "answers": [{"text": answer}]}]}
                for text, answer in riddles(count, seed)
            ]
            squad = {"data": [{"title": "tiny", "paragraphs": paragraphs}]}
            (directory / task / f"{split}-v1.1.json").write_text(json.dumps(squad))
        else:
            rows = [{"text": text, "answers": [answer]} for text, answer in riddles(count, seed)]
            (directory / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def _lcqmc(count: int, seed: int) -> Iterator[tuple[str, str, int]]:
    """Rows whose answer is yes when one text says 好 and no when it says 坏."""
    generator = random.Random(seed)
    for number in range(count):
        characters = generator.choices("日月树河石鸟", k=generator.randint(3, 6))
        characters.insert(generator.randrange(len(characters)), "好" if number % 2 else "坏")
        yield "".join(characters), "".join(generator.choices("日月树", k=3)), number % 2


def riddles(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Texts, and the answer that belongs to the one word of `PHRASES` that each holds."""
    generator = random.Random(seed)
    for number in range(count):
        word = list(PHRASES)[number % len(PHRASES)]
        words = generator.choices(["stone", "bird", "is", "it"], k=generator.randint(3, 8))
        words.insert(generator.randrange(len(words)), word)
        yield " ".join(words), PHRASES[word]
