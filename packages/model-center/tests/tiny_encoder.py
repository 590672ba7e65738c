"""A tiny random BERT with its tokenizer, and tiny tasks that it can learn: what recipes are tested with."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from model_center.model import Bert, BertConfig
from model_center.tokenizer import BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["sun", "moon", "tree", "river", "stone", "bird", "is", "it", "good", "bad", "?", "."]


def write_encoder(directory: Path, **changes: Any) -> Path:
    """Write a random encoder of two layers and a vocabulary of 17 words; `changes` are options of its config."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(SPECIAL + WORDS), "position_size": 32, "dim_model": 16, "num_heads": 2, "dim_head": 8}
    sizes |= {"dim_ff": 32, "num_layers": 2}
    spread = {"emb_init_std": 0.5, "att_init_std": 0.2, "ffn_init_std": 0.2}
    Bert(BertConfig(**{**sizes, **spread, "tied": True, **changes})).save_pretrained(directory)
    (directory / "words.txt").write_text("\n".join(SPECIAL + WORDS) + "\n")
    BertTokenizer.from_pretrained(directory / "words.txt").save_pretrained(directory)
    (directory / "words.txt").unlink()
    return directory


def boolq_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose answer is yes when the passage says good and no when it says bad, half of each."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        words = generator.choices(WORDS[:6], k=generator.randint(3, 8))
        words.insert(generator.randrange(len(words)), "good" if number % 2 else "bad")
        rows.append({"passage": " ".join(words), "question": "is it good", "label": bool(number % 2)})
    return rows


def copa_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose answer is the choice that says good."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        choices = [f"{generator.choice(WORDS[:6])} {word}" for word in ("good", "bad")]
        if number % 2:
            choices.reverse()
        row = {"premise": generator.choice(WORDS[:6]), "question": "effect", "label": number % 2}
        rows.append(row | {"choice1": choices[0], "choice2": choices[1]})
    return rows


def write_task(directory: Path, task: str = "BoolQ", train: int = 96, dev: int = 32) -> Path:
    """Write both splits of a task that `write_encoder`'s model can learn."""
    rows = {"BoolQ": boolq_rows, "COPA": copa_rows}[task]
    (directory / task).mkdir(parents=True)
    for split, count, seed in (("train", train, 1), ("val", dev, 2)):
        lines = (json.dumps(row) + "\n" for row in rows(count, seed))
        (directory / task / f"{split}.jsonl").write_text("".join(lines))
    return directory
