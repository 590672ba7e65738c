"""The ready encoders, with a tokenizer of the protocol and with a fast tokenizer of Transformers."""

import pickle
from pathlib import Path

import pytest

from model_center.dataset.indexed import MMapIndexedDataset
from model_center.tokenizer import BertTokenizer, Tokenizer
from model_center.tools import CausalLMEncoder, CPM1Encoder, Encoder, LocalExecutor, ReadOptions, tokenize_files

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lord", "##s", "of", "rings", "."]


class CharacterTokenizer:
    """A tokenizer of one's own: nothing but the protocol."""

    name = "characters"
    fingerprint = "0" * 64
    vocab_size = 500
    eod_id = 7
    pad_id = 0

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))


def test_one_document_per_line() -> None:
    encoder = CausalLMEncoder(CharacterTokenizer())
    assert isinstance(encoder, Encoder)
    assert encoder.encode("ab") == [[97, 98, 7]]
    assert encoder.encode_batch(["a", "b"]) == [[[97, 7]], [[98, 7]]]
    assert CausalLMEncoder(CharacterTokenizer(), append_eod=False).encode("ab") == [[97, 98]]
    assert encoder.vocab_size == 500


def test_long_documents_are_cut_and_short_rests_dropped() -> None:
    encoder = CausalLMEncoder(CharacterTokenizer(), max_length=4, min_length=2)
    assert encoder.encode("abcdefg") == [[97, 98, 99, 100], [101, 102, 103, 7]]
    assert encoder.encode("abcd") == [[97, 98, 99, 100]]
    assert CausalLMEncoder(CharacterTokenizer(), append_eod=False, min_length=2).encode("a") == []
    for longest, shortest in ((0, 0), (3, 4)):
        with pytest.raises(ValueError, match="`max_length` must be at least"):
            CausalLMEncoder(CharacterTokenizer(), max_length=longest, min_length=shortest)


def naive_cpm1(line: str) -> list[list[int]]:
    """Section 1.5.2, written out."""
    ids = [*CharacterTokenizer().encode(line.strip().replace("<n>", "\n")), 7]
    pieces, i = [], 0
    while i < len(ids):
        piece = ids[i : i + 512]
        if len(piece) < 32:
            break
        i += 512
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("length", [0, 30, 31, 511, 512, 542, 543, 1500])
def test_cpm1_follows_the_document(length: int) -> None:
    line = "  " + "ab<n>" * (length // 3) + "c" * (length % 3) + "\n"
    assert CPM1Encoder(CharacterTokenizer()).encode(line) == naive_cpm1(line)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


def test_fast_tokenizers_add_nothing_and_cut_nothing(bert: Path) -> None:
    tokenizer = BertTokenizer.from_pretrained(bert)
    assert isinstance(tokenizer, Tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    encoder = CausalLMEncoder(tokenizer)
    lines = ["The lords of the rings .", "of"]
    expected = [[[5, 6, 7, 8, 5, 9, 10, 3]], [[8, 3]]]
    assert encoder.encode_batch(lines) == expected
    assert [encoder.encode(line) for line in lines] == expected
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.encode_batch(lines) == expected


def test_special_tokens_are_split_by_any_number_of_workers(bert: Path, tmp_path: Path) -> None:
    tokenizer = BertTokenizer.from_pretrained(bert, split_special_tokens=True)
    (tmp_path / "data.txt").write_text("the [MASK] of [SEP] rings\n" * 50)
    datasets = []
    for workers in (1, 2):
        tokenize_files(
            [tmp_path / "data.txt"],
            tmp_path / f"out{workers}",
            CausalLMEncoder(tokenizer),
            options=ReadOptions(part_bytes=500),
            executor=LocalExecutor(workers),
        )
        datasets.append([(tmp_path / f"out{workers}_1{suffix}").read_bytes() for suffix in (".bin", ".idx")])
    assert datasets[0] == datasets[1]
    assert MMapIndexedDataset(tmp_path / "out2_1")[0].tolist() == [5, 1, 1, 1, 8, 1, 1, 1, 9, 3]
    # Calls with other options in between leave no trace.
    encoder, expected = CausalLMEncoder(tokenizer), [[5, 1, 1, 1, 3]]
    tokenizer("the", split_special_tokens=False)
    assert encoder.encode("the [MASK]") == CausalLMEncoder(tokenizer).encode("the [MASK]") == expected


def test_an_encoder_tells_what_made_the_data() -> None:
    assert CPM1Encoder(CharacterTokenizer()).provenance == {
        "encoder": {"name": "CPM1Encoder", "append_eod": True, "max_length": 512, "min_length": 32},
        "tokenizer": {"name": "characters", "fingerprint": "0" * 64, "vocab_size": 500},
    }
