"""Small vocabularies of every kind, and the real ones where the shared material is present."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARIES = Path(__file__).parent / "vocabularies"


@pytest.fixture
def vocabularies() -> Path:
    """The folder of the plain vocabularies `bert`, `cpm1` and `cpm2`."""
    return VOCABULARIES


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """Byte-level BPE: all bytes, a few merges, and the end of text."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r"]
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unigram sentencepiece model with T5's special tokens."""
    folder = tmp_path_factory.mktemp("t5")
    text = ["the cat sat on the mat", "a dog saw the cat", "studies show that", "translate English to German"] * 5
    (folder / "spiece.model").write_bytes(train(text, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=40))
    return folder


@pytest.fixture(scope="session")
def cpm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with CPM-1's special tokens in its order."""
    file = tmp_path_factory.mktemp("cpm1_original") / "chinese_vocab.model"
    text = ["我们 爱 北京 天安门", "清华 大学 在 北京 ▂ 海淀区", "今天 天气 真 好 ▃ abc 123"] * 5
    special = ["▃", "<sep>", "<pad>", "<mask>", "<eod>", "▂"]
    file.write_bytes(train(text, user_defined_symbols=special, vocab_size=60, add_dummy_prefix=True))
    return file


def train(text: list[str], **options: Any) -> bytes:
    """Train a sentencepiece model in memory."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, hard_vocab_limit=False, minloglevel=2, **options
    )
    return model.getvalue()
