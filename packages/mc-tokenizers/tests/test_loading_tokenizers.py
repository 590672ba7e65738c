"""`load_tokenizer` finds the class; what cannot be loaded is said in one message."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from model_center import tokenizer as package
from model_center.tokenizer import (
    BertTokenizer,
    CPM1Tokenizer,
    CPM2Tokenizer,
    GPT2Tokenizer,
    T5Tokenizer,
    load_tokenizer,
)


@pytest.fixture
def folders(vocabularies: Path, gpt2_folder: Path, t5_folder: Path, cpm_model: Path) -> dict[str, Path]:
    return {
        "BertTokenizer": vocabularies / "bert",
        "CPM1Tokenizer": vocabularies / "cpm1",
        "CPM2Tokenizer": vocabularies / "cpm2",
        "GPT2Tokenizer": gpt2_folder,
        "T5Tokenizer": t5_folder,
        "original CPM1Tokenizer": cpm_model.parent,
    }


CLASSES = ["BertTokenizer", "CPM1Tokenizer", "CPM2Tokenizer", "GPT2Tokenizer", "T5Tokenizer", "original CPM1Tokenizer"]


def load(path: Path) -> Any:
    options: dict[str, Any] = {"max_sentinels": 3} if "cpm2" in path.parts else {}
    return load_tokenizer(path, **options)


@pytest.mark.parametrize("name", CLASSES)
def test_the_files_tell_the_class(name: str, folders: dict[str, Path]) -> None:
    tokenizer = load(folders[name])
    assert type(tokenizer).__name__ == name.split()[-1]
    assert tokenizer.name == folders[name].name
    for file in folders[name].iterdir():
        assert load(file).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["BertTokenizer", "GPT2Tokenizer", "T5Tokenizer"])
def test_tokenizer_json_tells_the_class(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load(folders[name])
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again).__name__ == name
    assert again.encode("the cat") == tokenizer.encode("the cat")


@pytest.mark.parametrize(
    ("model_type", "folder", "expected"),
    [
        ("gptj", "GPT2Tokenizer", "GPTjTokenizer"),
        ("mt5", "T5Tokenizer", "T5Tokenizer"),
        ("cpm1", "CPM2Tokenizer", "CPM1Tokenizer"),
    ],
)
def test_the_model_type_tells_the_class(
    model_type: str, folder: str, expected: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(folders[folder], tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert type(load_tokenizer(copy)).__name__ == expected


def test_gptjs_additional_tokens_tell_it_from_gpt2(gpt2_folder: Path) -> None:
    (gpt2_folder / "added_tokens.json").write_text(json.dumps({"<|extratoken_1|>": 263, "<|extratoken_2|>": 264}))
    tokenizer = load_tokenizer(gpt2_folder)
    assert type(tokenizer).__name__ == "GPTjTokenizer"
    assert len(tokenizer) == 265


def test_real_directories(shared_dir: Path) -> None:
    configs = shared_dir / "data/modelcenter_configs"
    families = {
        "bert/bert-base-cased": "Bert",
        "gpt2/gpt2-base": "GPT2",
        "gptj/gptj-6b": "GPTj",
        "t5/t5-small": "T5",
        "cpm1/cpm1-large": "CPM1",
        "cpm2/cpm2-large": "CPM2",
    }
    for folder, family in families.items():
        assert type(load_tokenizer(configs / folder)).__name__ == f"{family}Tokenizer"
    assert load_tokenizer(configs / "cpm2/cpm2-large").encode("我 们\n")[1::2] == [10, 3]


def test_an_identifier_is_fetched_from_the_hub(vocabularies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(vocabularies / "bert"))
    tokenizer = load_tokenizer("bert-base-uncased")
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer.name == "bert-base-uncased"


def error_of(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the callers look at the whole message
        function(*arguments, **options)
    return str(error.value)


def test_a_misspelt_identifier_gives_the_nearest() -> None:
    assert "did you mean bert-base-uncased" in error_of(load_tokenizer, "bert-base-uncasd")
    assert "did you mean t5-small?" in error_of(T5Tokenizer.from_pretrained, "t5-smal")
    assert "known are gpt2-base, gpt2-medium, gpt2-large, gpt2-xl" in error_of(GPT2Tokenizer.from_pretrained, "zzz")


def test_a_missing_directory_is_named() -> None:
    for load_from in (load_tokenizer, BertTokenizer.from_pretrained, CPM1Tokenizer.from_pretrained):
        message = error_of(load_from, "./no/such")
        assert f"looked for {Path('no/such').absolute()}" in message
        assert "Give the directory" in message


def test_a_directory_without_vocabulary_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.pt").touch()
    expected = {
        load_tokenizer: "tokenizer.json, vocab.txt, vocab.json with merges.txt, and *.model",
        BertTokenizer.from_pretrained: "tokenizer.json, or vocab.txt",
        GPT2Tokenizer.from_pretrained: "tokenizer.json, or vocab.json and merges.txt",
        T5Tokenizer.from_pretrained: "tokenizer.json, or spiece.model",
        CPM2Tokenizer.from_pretrained: "vocab.txt, or chinese_vocab.model",
    }
    for load_from, looked_for in expected.items():
        message = error_of(load_from, tmp_path)
        assert str(tmp_path) in message
        assert looked_for in message
        assert "found config.json, weights.pt" in message


def test_an_unknown_model_type_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    message = error_of(load_tokenizer, tmp_path)
    assert "config.json" in message
    assert "`model_type` 'llama'; known are bert, gpt2, gptj, t5, mt5, cpm1, cpm2" in message


def test_a_vocabulary_of_no_known_kind(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("a\nb\n")
    assert "belongs to no tokenizer known here" in error_of(load_tokenizer, file)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {}}}))
    assert "looked for a WordPiece, BPE or Unigram tokenizer.json" in error_of(load_tokenizer, tmp_path)


def test_a_vocabulary_without_the_special_tokens(vocabularies: Path, gpt2_folder: Path, tmp_path: Path) -> None:
    message = error_of(BertTokenizer.from_pretrained, vocabularies / "cpm1")
    assert f"{vocabularies / 'cpm1/vocab.txt'}: the vocabulary of" in message
    assert all(f"`{name}_token` is '[{name.upper()}]'" in message for name in ("pad", "unk", "cls", "sep", "mask"))
    message = error_of(CPM1Tokenizer, vocabularies / "bert/vocab.txt")
    assert "`eod_token` is '<eod>'" in message
    assert "pass the names it uses instead" in message
    assert "`sod_token` is '<s>'; `eod_token` is '<eod>'" in error_of(CPM2Tokenizer, vocabularies / "bert/vocab.txt")
    message = error_of(CPM1Tokenizer, vocabularies / "cpm1/vocab.txt", eod_token="<end>")
    assert "`eod_token` is '<end>' (nearest: <eod>" in message
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text())
    del vocabulary["<|endoftext|>"]
    (gpt2_folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert "`eos_token` is '<|endoftext|>'" in error_of(GPT2Tokenizer.from_pretrained, gpt2_folder)


def test_special_tokens_of_other_names_are_accepted(vocabularies: Path, tmp_path: Path) -> None:
    text = (vocabularies / "bert/vocab.txt").read_text(encoding="utf-8").replace("[CLS]", "<s>")
    (tmp_path / "vocab.txt").write_text(text, encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(tmp_path, cls_token="<s>")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the")) == ["<s>", "the", "[SEP]"]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"cls_token": {"content": "<s>", "__type": "AddedToken"}})
    )
    assert BertTokenizer.from_pretrained(tmp_path).encode("the") == tokenizer.encode("the")


def test_too_few_sentinels(vocabularies: Path) -> None:
    message = error_of(CPM2Tokenizer, vocabularies / "cpm2/vocab.txt")
    assert "lacks the sentinel <s_3>, and `max_sentinels` is 190. Lower it to 3" in message
    assert "`max_sentinels` must not be negative, but is -1" in error_of(
        CPM2Tokenizer, vocabularies / "cpm2/vocab.txt", max_sentinels=-1
    )


def test_a_sentencepiece_model_where_a_vocabulary_is_expected(t5_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    shutil.copy(t5_folder / "spiece.model", file)
    for load_from in (CPM1Tokenizer, CPM2Tokenizer, BertTokenizer.from_pretrained, load_tokenizer):
        message = error_of(load_from, file)
        assert f"{file}, line " in message
        assert "expected a vocabulary of one token a line, but this is a sentencepiece model" in message
        assert "suffix .model" in message
    file.write_bytes(b"<pad>\n\xff\xfe\n")
    assert f"{file}, line 2: expected a vocabulary of one token a line, but this is not UTF-8" in error_of(
        CPM1Tokenizer, file
    )


def test_a_vocabulary_where_a_sentencepiece_model_is_expected(vocabularies: Path, tmp_path: Path) -> None:
    for name, load_from in (("spiece.model", T5Tokenizer.from_pretrained), ("chinese_vocab.model", CPM1Tokenizer)):
        file = tmp_path / name
        shutil.copy(vocabularies / "cpm1/vocab.txt", file)
        message = error_of(load_from, file)
        assert f"{file} is not a sentencepiece model" in message
        assert "suffix .txt" in message


def test_broken_files_are_named_with_their_line(gpt2_folder: Path, tmp_path: Path, vocabularies: Path) -> None:
    merges = gpt2_folder / "merges.txt"
    merges.write_text("#version: 0.2\nh e\nbroken\n")
    assert f"{merges}, line 3: expected two tokens" in error_of(GPT2Tokenizer.from_pretrained, gpt2_folder)
    merges.write_text("#version: 0.2\nzz yy\n")
    assert "Token `zz` out of vocabulary" in error_of(GPT2Tokenizer.from_pretrained, gpt2_folder)
    (gpt2_folder / "vocab.json").write_text('{"a": 0,\n"b": }')
    assert f"{gpt2_folder / 'vocab.json'}, line 2: not valid JSON" in error_of(
        GPT2Tokenizer.from_pretrained, gpt2_folder
    )
    (gpt2_folder / "vocab.json").write_text("[]")
    assert "expected a JSON object, found a list" in error_of(GPT2Tokenizer.from_pretrained, gpt2_folder)
    file = tmp_path / "vocab.txt"
    assert f"{file}: cannot read" in error_of(CPM1Tokenizer, file)
    file.write_text("\n")
    assert "the vocabulary is empty" in error_of(CPM1Tokenizer, file)
    file.write_text((vocabularies / "cpm1/vocab.txt").read_text(encoding="utf-8") + "<sep>\n", encoding="utf-8")
    assert f"{file}, line 4: the token '<sep>' is there again in line" in error_of(CPM1Tokenizer, file)


def test_a_tokenizer_of_another_kind(vocabularies: Path, gpt2_folder: Path, tmp_path: Path) -> None:
    GPT2Tokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    tokens = {f"{name}_token": "h" for name in ("pad", "unk", "cls", "sep", "mask")}
    message = error_of(BertTokenizer.from_pretrained, tmp_path, **tokens)
    assert "holds a BPE tokenizer, but BertTokenizer needs WordPiece" in message


def test_a_byte_order_mark_is_no_part_of_the_first_token(vocabularies: Path, tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes(b"\xef\xbb\xbf" + (vocabularies / "cpm1/vocab.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert CPM1Tokenizer(file).pad_id == 0


def test_unknown_names_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Bert'"):
        _ = package.Bert
    assert set(package.__all__) <= set(dir(package))
