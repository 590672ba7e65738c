"""CPM-1's and CPM-2's tokenizers against the original's output and a naive reference."""

import inspect
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import jieba
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from model_center.tokenizer import CPM1Tokenizer, CPM2Tokenizer, Tokenizer

jieba.setLogLevel(logging.WARNING)
VOCABULARIES = Path(__file__).parent / "vocabularies"
CPM1 = CPM1Tokenizer(VOCABULARIES / "cpm1" / "vocab.txt")
CPM1_HALF_WIDTH = CPM1Tokenizer(VOCABULARIES / "cpm1" / "vocab.txt", q2b=True)
CPM2 = CPM2Tokenizer(VOCABULARIES / "cpm2" / "vocab.txt", max_sentinels=3, line_token="▃", space_token="▂")

texts = st.one_of(
    st.text(alphabet="我们爱北京天安门清华大学今气真好的一 \n,，。、！Ａ１２<>/_nabcAB12-+.\u3000😀", max_size=40),
    st.text(max_size=10),
    st.lists(st.sampled_from([*CPM1.get_vocab(), *CPM2.get_vocab(), "１－２", "\r\n"]), max_size=12).map("".join),
)


def naive_ids(tokenizer: CPM1Tokenizer | CPM2Tokenizer, text: str) -> list[int]:
    """jieba's words, each matched from the left with the longest token of the vocabulary."""
    ids_of = {**tokenizer.get_vocab(), " ": tokenizer.space_id, "\n": tokenizer.line_id}
    ids = []
    for word in jieba.cut(text.replace(tokenizer.line_token, "\n").replace(tokenizer.space_token, " ")):
        if tokenizer.q2b:
            word = "".join(naive_half_width(character) for character in word)
        while word:
            match = next((word[:end] for end in range(len(word), 0, -1) if word[:end] in ids_of), word[0])
            ids.append(ids_of.get(match, tokenizer.unk_id))
            word = word[len(match) :]
    return ids


def naive_half_width(character: str) -> str:
    if 0xFF01 <= ord(character) <= 0xFF5E:
        return chr(ord(character) - 0xFEE0)
    return {"。": "｡", "、": "､"}.get(character, character)


def spelled(tokenizer: CPM1Tokenizer | CPM2Tokenizer, text: str) -> str:
    """What is left of a text when every character that begins no token has become the unknown token."""
    place = 0
    result = ""
    for index in tokenizer.encode(text):
        if index == tokenizer.unk_id:
            length = 1
            result += tokenizer.unk_token
        else:
            is_mark = index in (tokenizer.space_id, tokenizer.line_id)
            length = 1 if is_mark else len(tokenizer.convert_ids_to_tokens(index))
            result += text[place : place + length]
        place += length
    assert place == len(text)
    return result


@pytest.mark.parametrize("tokenizer", [CPM1, CPM1_HALF_WIDTH, CPM2], ids=["cpm1", "q2b", "cpm2"])
@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_ids_are_those_of_the_naive_reference(tokenizer: CPM1Tokenizer | CPM2Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == naive_ids(tokenizer, text)


@pytest.mark.parametrize("tokenizer", [CPM1, CPM2], ids=["cpm1", "cpm2"])
@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_decoding_gives_the_text_but_for_unknown_characters(
    tokenizer: CPM1Tokenizer | CPM2Tokenizer, text: str
) -> None:
    text = text.replace(tokenizer.line_token, "\n").replace(tokenizer.space_token, " ")
    assert tokenizer.decode(tokenizer.encode(text)) == spelled(tokenizer, text)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_tokens_and_ids_are_one_to_one(text: str) -> None:
    tokens = CPM1.tokenize(text)
    assert CPM1.convert_tokens_to_ids(tokens) == CPM1.encode(text)
    assert [CPM1.convert_tokens_to_ids(token) for token in tokens] == CPM1.encode(text)
    assert CPM1.convert_ids_to_tokens(CPM1.encode(text)) == tokens


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Any:
    return json.loads((shared_dir / "golden/cpm_tokenizers.json").read_text(encoding="utf-8"))


def original(shared_dir: Path, case: str) -> CPM1Tokenizer | CPM2Tokenizer:
    folder = shared_dir / "data/modelcenter_configs"
    if case == "cpm2":
        return CPM2Tokenizer(folder / "cpm2/cpm2-large/vocab.txt", space_token="▂", line_token="▃")
    return CPM1Tokenizer(folder / "cpm1/cpm1-large/vocab.txt", q2b=case == "cpm1_q2b")


@pytest.mark.parametrize("case", ["cpm1", "cpm1_q2b", "cpm2"])
def test_ids_and_texts_are_those_of_the_original(shared_dir: Path, golden: Any, case: str) -> None:
    tokenizer = original(shared_dir, case)
    assert len(golden[case]) >= 60
    for row in golden[case]:
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]


def test_properties_are_those_of_the_original(shared_dir: Path, golden: Any) -> None:
    for case in ("cpm1", "cpm2"):
        tokenizer = original(shared_dir, case)
        expected = dict(golden[f"{case}_props"])
        assert len(tokenizer) == expected.pop("len")
        if isinstance(tokenizer, CPM2Tokenizer):
            assert tokenizer.sentinel_list[:5] == expected.pop("sentinels")
            assert len(tokenizer.sentinel_list) == expected.pop("n_sentinels")
        assert {name: getattr(tokenizer, name) for name in expected} == expected


@pytest.mark.parametrize("case", ["cpm1", "cpm2"])
@pytest.mark.parametrize("corpus", ["fortunes_zh.txt", "quan_tang_shi_0-6k.txt"])
def test_round_trip_of_every_line_of_a_corpus(shared_dir: Path, case: str, corpus: str) -> None:
    tokenizer = original(shared_dir, case)
    lines = (shared_dir / "data/corpora/zh" / corpus).read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) > 5000
    different = [line for line in lines if tokenizer.decode(tokenizer.encode(line)) != spelled(tokenizer, line)]
    assert different == []


def test_documented_signatures() -> None:
    # Sections 1.10.3 and 1.11.3; the document prints CPM-2's space_token as </>, an artefact of its conversion.
    cpm1 = {"vocab_file": inspect.Parameter.empty, "max_len": None, "q2b": False}
    tokens = {"eod_token": "<eod>", "pad_token": "<pad>", "unk_token": "<unk>"}
    marks = {"line_token": "</n>", "space_token": "</_>"}
    cpm2 = {"vocab_file": inspect.Parameter.empty, "max_sentinels": 190, "max_len": None, "q2b": False}
    documented: dict[type, dict[str, object]] = {
        CPM1Tokenizer: {**cpm1, **tokens, **marks},
        CPM2Tokenizer: {**cpm2, "sod_token": "<s>", **tokens, **marks},
    }
    for tokenizer_class, expected in documented.items():
        parameters = inspect.signature(tokenizer_class).parameters
        assert [(name, parameter.default) for name, parameter in parameters.items()] == list(expected.items())


def test_special_tokens_may_have_other_names(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("[end]\n[pad]\n[?]\n[line]\n[space]\n[start]\n<s_0>\n好", encoding="utf-8")
    names: dict[str, Any] = {
        "eod_token": "[end]", "pad_token": "[pad]", "unk_token": "[?]", "line_token": "[line]", "space_token": "[space]"
    }  # fmt: skip
    cpm1 = CPM1Tokenizer(file, **names)
    cpm2 = CPM2Tokenizer(file, max_sentinels=1, sod_token="[start]", **names)
    for tokenizer in (cpm1, cpm2):
        assert tokenizer.encode("好 好\n坏") == [7, 4, 7, 3, 2]
        assert tokenizer.decode([7, 4, 7, 3, 2, 0]) == "好 好\n[?][end]"
        assert (tokenizer.eod_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 1, 2)
        assert (tokenizer.line_id, tokenizer.space_id) == (3, 4)
    assert (cpm2.sod_id, cpm2.sentinel_list) == (5, [6])


def test_the_marks_of_cpm2s_published_vocabulary_are_found() -> None:
    tokenizer = CPM2Tokenizer(VOCABULARIES / "cpm2" / "vocab.txt", max_sentinels=3)
    assert (tokenizer.space_token, tokenizer.line_token) == ("▂", "▃")
    assert tokenizer.fingerprint == CPM2.fingerprint


def test_max_len_limits_the_ids() -> None:
    short = CPM1Tokenizer(VOCABULARIES / "cpm1" / "vocab.txt", max_len=3)
    assert short.encode("我们爱北京天安门") == CPM1.encode("我们爱北京天安门")[:3]
    assert short.tokenize("我们爱北京天安门") == ["我们", "爱", "北京"]
    with pytest.raises(ValueError, match="`max_len` must be at least 1"):
        CPM1Tokenizer(VOCABULARIES / "cpm1" / "vocab.txt", max_len=0)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for ids in ([0, len(CPM1.get_vocab())], [-1]):
        with pytest.raises(ValueError, match=rf"ids of cpm1 are 0 to {CPM1.vocab_size - 1}, but one is {ids[-1]}"):
            CPM1.decode(ids)
        with pytest.raises(ValueError, match="the ids of cpm1"):
            CPM1.convert_ids_to_tokens(ids)
    assert CPM1.convert_tokens_to_ids(["龘", "好"]) == [CPM1.unk_id, CPM1.convert_tokens_to_ids("好")]


def test_a_copy_for_another_process_gives_the_same_ids(cpm_model: Path) -> None:
    for tokenizer in (CPM1_HALF_WIDTH, CPM2, CPM1Tokenizer(cpm_model)):
        text = "今天 天气真好，\n我们爱１２"
        ids = tokenizer.encode(text)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(text) == ids
        assert copy.fingerprint == tokenizer.fingerprint


def test_a_saved_tokenizer_is_loaded_again(cpm_model: Path, tmp_path: Path) -> None:
    for tokenizer in (CPM1, CPM1Tokenizer(cpm_model)):
        tokenizer.save_pretrained(tmp_path / "new" / tokenizer.name)
        again = CPM1Tokenizer.from_pretrained(tmp_path / "new" / tokenizer.name)
        assert again.fingerprint == tokenizer.fingerprint
        again.save_pretrained(tmp_path / "new" / tokenizer.name)


def test_fingerprints_tell_what_changes_ids(tmp_path: Path, cpm_model: Path) -> None:
    file = VOCABULARIES / "cpm1" / "vocab.txt"
    elsewhere = tmp_path / "other.txt"
    elsewhere.write_bytes(file.read_bytes())
    swapped = tmp_path / "swapped.txt"
    swapped.write_text(file.read_text(encoding="utf-8").replace("我们\n爱", "爱\n我们"), encoding="utf-8")
    different = [
        CPM1,
        CPM1_HALF_WIDTH,
        CPM2,
        CPM1Tokenizer(file, max_len=5),
        CPM1Tokenizer(file, unk_token="<mask>"),
        CPM1Tokenizer(file, pad_token="<sep>"),
        CPM1Tokenizer(swapped),
        CPM1Tokenizer(cpm_model),
        CPM1Tokenizer(cpm_model, q2b=True),
    ]
    assert len({tokenizer.fingerprint for tokenizer in different}) == len(different)
    assert CPM1Tokenizer(elsewhere).fingerprint == CPM1.fingerprint


def test_both_are_tokenizers() -> None:
    for tokenizer in (CPM1, CPM2):
        assert isinstance(tokenizer, Tokenizer)
        assert all(index < len(tokenizer) for index in tokenizer.get_vocab().values())
    assert CPM1.name == "cpm1"


def naive_sentencepiece_ids(processor: SentencePieceProcessor, text: str) -> list[int]:
    """CPM-1's original way: jieba's words with spaces between them, given to sentencepiece."""
    words = [word.replace(" ", "▂").replace("\n", "▃") for word in jieba.cut(text)]
    ids: list[int] = processor.encode(" ".join(words))
    return ids


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_the_original_model_file_gives_sentencepieces_ids(cpm_model: Path, text: str) -> None:
    processor = SentencePieceProcessor(model_file=str(cpm_model))
    assert CPM1Tokenizer(cpm_model).encode(text) == naive_sentencepiece_ids(processor, text)


def test_round_trip_with_cpm1s_original_model(shared_dir: Path) -> None:
    file = shared_dir / "data/cpm1_original_spm/chinese_vocab.model"
    tokenizer = CPM1Tokenizer(file)
    processor = SentencePieceProcessor(model_file=str(file))
    assert (tokenizer.space_token, tokenizer.line_token, tokenizer.vocab_size) == ("▂", "▃", 30000)
    text = "今天 天气真好，\n我们去清华大学。"
    assert tokenizer.encode(text) == naive_sentencepiece_ids(processor, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("，", ",")
    assert tokenizer.decode([tokenizer.eod_id]) == "<eod>"
    lines = (shared_dir / "data/corpora/zh/fortunes_zh.txt").read_text(encoding="utf-8").splitlines()[:300]
    assert all(tokenizer.encode(line) == naive_sentencepiece_ids(processor, line) for line in lines)


def test_q2b_with_the_original_model(shared_dir: Path) -> None:
    tokenizer = CPM1Tokenizer(shared_dir / "data/cpm1_original_spm/chinese_vocab.model", q2b=True)
    assert "，" not in tokenizer.decode(tokenizer.encode("好，好！"))
