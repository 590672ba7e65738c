"""Tiny corpora, a tokenizer that needs no files, and tiny models for the tests of pre-training data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model_center.dataset import make_builder
from model_center.model.config import Config
from model_center.model.families import families

WORDS = range(120, 180)  # ids of ordinary tokens
END = 1


class TinyTokenizer:
    """Special tokens of all families below 120, words from there on."""

    name, fingerprint = "tiny", "0123456789abcdef"
    vocab_size = WORDS.stop
    eod_id, pad_id, sod_id = END, 0, 2
    sentinel_list: Sequence[int] = range(10, 110)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        special = {"[CLS]": 2, "[SEP]": END, "[MASK]": 3}
        sentinels = {f"<extra_id_{number}>": 10 + number for number in range(100)}
        words = {f"##{word}" if word % 3 == 0 else f"w{word}": word for word in WORDS}
        return special | sentinels | words

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


def tiny_config(model_type: str, **options: Any) -> Config:
    depth = {"num_encoder_layers": 1, "num_decoder_layers": 1} if model_type in ("t5", "cpm2") else {"num_layers": 1}
    sizes = {"dim_model": 16, "num_heads": 2, "dim_head": 8, "dim_ff": 32, "vocab_size": WORDS.stop + 1}
    common = {"dropout_p": 0.0, "emb_init_std": 0.1, "att_init_std": 0.1, "ffn_init_std": 0.1, "half": False}
    if model_type == "gptj":
        common["pos_rotary_dim"] = 4
    return families[model_type].config_class(**(sizes | depth | common | options))


def write_corpus(
    folder: Path, files: Sequence[Sequence[int]], *, name: str = "train", seed: int = 0, **more: Any
) -> Path:
    """Write one data set for each list of document lengths; documents end with the id `END`."""
    random = np.random.default_rng(seed)
    for number, lengths in enumerate(files, start=1):
        with make_builder(folder / f"{name}_{number}", dtype=np.uint16, **more) as builder:
            for length in lengths:
                tokens = random.integers(WORDS.start, WORDS.stop, length)
                if length:
                    tokens[-1] = END
                builder.add_item(tokens)
                builder.end_document()
    return folder
