"""The fast tokenizers against Transformers' own, and what is added to them."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
import transformers
from huggingface_hub.errors import OfflineModeIsEnabled
from tokenizers import models, normalizers, pre_tokenizers

from model_center.tokenizer import BertTokenizer, GPT2Tokenizer, GPTjTokenizer, T5Tokenizer, Tokenizer, resolve

TEXTS = [
    "The cat sat on a mat!",
    "unbelievable dogs, don't",
    "studies show that ÀÉ 你好 <extra_id_0>",
    "",
    "  hello  world ",
]
REAL = [
    (BertTokenizer, transformers.BertTokenizer, "bert/bert-base-uncased", {}),
    (BertTokenizer, transformers.BertTokenizer, "bert/bert-base-cased", {"do_lower_case": False}),
    (BertTokenizer, transformers.BertTokenizer, "bert/bert-base-chinese", {}),
    (GPT2Tokenizer, transformers.GPT2Tokenizer, "gpt2/gpt2-base", {}),
    (GPTjTokenizer, transformers.GPT2Tokenizer, "gptj/gptj-6b", {}),
    (T5Tokenizer, transformers.T5Tokenizer, "t5/t5-small", {}),
    (T5Tokenizer, transformers.T5Tokenizer, "t5/t5-v1_1-small", {}),
]


@pytest.mark.parametrize(("ours", "theirs", "folder", "options"), REAL, ids=[row[2] for row in REAL])
def test_ids_are_those_of_transformers(shared_dir: Path, ours: Any, theirs: Any, folder: str, options: Any) -> None:
    path = shared_dir / "data/modelcenter_configs" / folder
    tokenizer, reference = ours.from_pretrained(path), theirs.from_pretrained(path, **options)
    lines = (shared_dir / "data/corpora/en/wikitext2_valid.txt").read_text(encoding="utf-8").splitlines()[:200]
    pairs = list(zip(lines, reversed(lines), strict=True))
    assert tokenizer(lines + TEXTS)["input_ids"] == reference(lines + TEXTS)["input_ids"]
    assert dict(tokenizer(pairs, truncation=True, max_length=50)) == dict(
        reference(pairs, truncation=True, max_length=50)
    )
    assert tokenizer.name == path.name


def test_the_padding_id_of_gpt2_is_the_one_behind_its_vocabulary(shared_dir: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(shared_dir / "data/modelcenter_configs/gpt2/gpt2-base")
    assert (tokenizer.pad_id, tokenizer.eod_id, tokenizer.vocab_size, len(tokenizer)) == (50257, 50256, 50257, 50258)


@pytest.fixture
def folders(vocabularies: Path, gpt2_folder: Path, t5_folder: Path) -> dict[Any, Path]:
    return {
        BertTokenizer: vocabularies / "bert",
        GPT2Tokenizer: gpt2_folder,
        GPTjTokenizer: gpt2_folder,
        T5Tokenizer: t5_folder,
    }


FAMILIES = [BertTokenizer, GPT2Tokenizer, GPTjTokenizer, T5Tokenizer]


@pytest.mark.parametrize("family", FAMILIES)
def test_works_as_a_transformers_tokenizer(family: Any, folders: dict[Any, Path]) -> None:
    tokenizer = family.from_pretrained(folders[family])
    single, pair = tokenizer("the cat sat"), tokenizer("the cat", "hello world")
    assert tokenizer.decode(single["input_ids"], skip_special_tokens=True).strip() == "the cat sat"
    assert tokenizer.encode("the cat", "hello world") == pair["input_ids"]
    batch = tokenizer(["the cat", "the cat sat on a mat"], padding=True)
    short, long = batch["input_ids"]
    assert len(short) == len(long)
    assert short[-1] == tokenizer.pad_id
    assert [sum(mask) for mask in batch["attention_mask"]] == [
        len(tokenizer.encode(text)) for text in ("the cat", "the cat sat on a mat")
    ]
    assert isinstance(tokenizer, Tokenizer)
    assert max(short + long) < len(tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_gives_the_same_ids(family: Any, folders: dict[Any, Path], tmp_path: Path) -> None:
    tokenizer = family.from_pretrained(folders[family])
    tokenizer.save_pretrained(tmp_path / "saved")
    again = family.from_pretrained(tmp_path / "saved")
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (again.eod_id, again.pad_id, len(again)) == (tokenizer.eod_id, tokenizer.pad_id, len(tokenizer))
    assert again.name == "saved"


def test_bert_tells_a_cased_vocabulary(vocabularies: Path, tmp_path: Path) -> None:
    uncased = BertTokenizer.from_pretrained(vocabularies / "bert")
    assert uncased.tokenize("The CAT") == ["the", "cat"]
    cased_file = tmp_path / "vocab.txt"
    cased_file.write_text((vocabularies / "bert/vocab.txt").read_text(encoding="utf-8") + "The\n", encoding="utf-8")
    assert BertTokenizer.from_pretrained(tmp_path).tokenize("The cat") == ["The", "cat"]
    assert BertTokenizer.from_pretrained(cased_file).tokenize("The cat") == ["The", "cat"]
    assert BertTokenizer.from_pretrained(tmp_path, do_lower_case=True).tokenize("The cat") == ["the", "cat"]
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer_config.json").unlink()
    assert BertTokenizer.from_pretrained(tmp_path / "saved").tokenize("The cat") == ["The", "cat"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert BertTokenizer.from_pretrained(tmp_path).tokenize("The cat") == ["the", "cat"]


CHANGES_OF_FILES: list[tuple[Any, Any, dict[str, Any]]] = [
    *((BertTokenizer, transformers.BertTokenizer, {"do_lower_case": value}) for value in (False, True)),
    *((BertTokenizer, transformers.BertTokenizer, {"strip_accents": value}) for value in (False, True)),
    *((BertTokenizer, transformers.BertTokenizer, {"tokenize_chinese_chars": value}) for value in (False, True)),
    (BertTokenizer, transformers.BertTokenizer, {"unk_token": "[MASK]"}),
    *((GPT2Tokenizer, transformers.GPT2Tokenizer, {"add_prefix_space": value}) for value in (False, True)),
    *((GPTjTokenizer, transformers.GPT2Tokenizer, {"add_prefix_space": value}) for value in (False, True)),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), CHANGES_OF_FILES)
def test_options_change_what_tokenizer_json_says(
    ours: Any, theirs: Any, options: dict[str, Any], folders: dict[Any, Path], tmp_path: Path
) -> None:
    opposite = {name: not value if isinstance(value, bool) else "[UNK]" for name, value in options.items()}
    theirs.from_pretrained(folders[ours], **opposite).save_pretrained(tmp_path / "opposite")
    (tmp_path / "opposite" / "vocab.txt").unlink(missing_ok=True)
    texts = ["The CAT sat", "a cát sat", "你好 cat", "hello zebra"]

    def ids(tokenizer: Any) -> Any:
        return [tokenizer(text)["input_ids"] for text in texts]

    expected = ids(theirs.from_pretrained(tmp_path / "opposite", **options))
    assert expected != ids(ours.from_pretrained(tmp_path / "opposite"))
    tokenizer = ours.from_pretrained(tmp_path / "opposite", **options)
    assert ids(tokenizer) == expected
    assert {name: getattr(tokenizer, name) for name in options} == options

    config = json.loads((tmp_path / "opposite" / "tokenizer_config.json").read_text())
    shutil.copytree(tmp_path / "opposite", tmp_path / "stated")
    (tmp_path / "stated" / "tokenizer_config.json").write_text(json.dumps(config | options))
    assert ids(ours.from_pretrained(tmp_path / "stated")) == expected

    tokenizer.save_pretrained(tmp_path / "saved")
    assert ids(ours.from_pretrained(tmp_path / "saved")) == ids(theirs.from_pretrained(tmp_path / "saved")) == expected
    assert ours.from_pretrained(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("options", [row[2] for row in CHANGES_OF_FILES if "unk_token" not in row[2]])
def test_a_tokenizer_json_alone_says_all(options: dict[str, Any], folders: dict[Any, Path], tmp_path: Path) -> None:
    family: Any = GPT2Tokenizer if "add_prefix_space" in options else BertTokenizer
    tokenizer = family.from_pretrained(folders[family], **options)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    again = family.from_pretrained(tmp_path)
    for text in ("The CAT sat", "a cát sat", "你好 cat", "hello world"):
        assert again.tokenize(text) == tokenizer.tokenize(text)
    assert {name: getattr(again, name) for name in options} == options


def test_a_tokenizer_json_with_steps_of_its_own_stays_as_it_is(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "The", "th", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    families: list[tuple[Any, Any, str]] = [
        (BertTokenizer, models.WordPiece(vocabulary, unk_token="[UNK]"), "do_lower_case"),
        (GPT2Tokenizer, models.BPE(vocabulary, [], unk_token="[UNK]"), "add_prefix_space"),
    ]
    for family, model, option in families:
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Replace("sat", "the")
        backend.pre_tokenizer = pre_tokenizers.Split("-", "removed")
        folder = tmp_path / family.__name__
        folder.mkdir()
        backend.save(str(folder / "tokenizer.json"))
        tokenizer = family.from_pretrained(folder)
        assert tokenizer.encode("sat-cat-The", add_special_tokens=False) == backend.encode("sat-cat-The").ids
        with pytest.raises(ValueError, match=rf"`{option}` would change nothing: .*`normalizer.type` is 'Replace'"):
            family.from_pretrained(folder, **{option: True})


def test_eod_ids(folders: dict[Any, Path]) -> None:
    ends = {family: family.from_pretrained(folder) for family, folder in folders.items()}
    assert {
        family.__name__: tokenizer.convert_ids_to_tokens(tokenizer.eod_id) for family, tokenizer in ends.items()
    } == {
        "BertTokenizer": "[SEP]",
        "GPT2Tokenizer": "<|endoftext|>",
        "GPTjTokenizer": "<|endoftext|>",
        "T5Tokenizer": "</s>",
    }
    assert ends[GPTjTokenizer].pad_id == ends[GPTjTokenizer].eod_id
    assert ends[GPT2Tokenizer].pad_id == ends[GPT2Tokenizer].vocab_size


def test_a_missing_padding_token_is_named(vocabularies: Path) -> None:
    tokenizer = BertTokenizer.from_pretrained(vocabularies / "bert")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="bert has no `pad_token`"):
        _ = tokenizer.pad_id


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_for_another_process_gives_the_same_ids(family: Any, folders: dict[Any, Path]) -> None:
    tokenizer = family.from_pretrained(folders[family])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (copy.name, copy.fingerprint) == (tokenizer.name, tokenizer.fingerprint)


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprints_tell_what_changes_ids(family: Any, folders: dict[Any, Path], tmp_path: Path) -> None:
    tokenizer = family.from_pretrained(folders[family])
    fingerprint = tokenizer.fingerprint
    tokenizer(["the cat", "a"], padding=True, truncation=True, max_length=2)
    assert tokenizer.fingerprint == fingerprint
    moved = shutil.copytree(folders[family], tmp_path / "moved")
    assert family.from_pretrained(moved).fingerprint == fingerprint
    tokenizer.add_tokens(["catsat"])
    assert tokenizer.fingerprint != fingerprint


def test_fingerprints_tell_options(vocabularies: Path) -> None:
    folder = vocabularies / "bert"
    different = [
        BertTokenizer.from_pretrained(folder),
        BertTokenizer.from_pretrained(folder, do_lower_case=False),
        BertTokenizer.from_pretrained(folder, pad_token="[MASK]"),
        BertTokenizer.from_pretrained(folder, split_special_tokens=True),
    ]
    assert len({tokenizer.fingerprint for tokenizer in different}) == len(different)


DOCUMENTED = {
    BertTokenizer: "bert-base-cased bert-base-uncased bert-large-cased bert-large-uncased bert-base-chinese "
    "bert-base-multilingual-cased",
    GPT2Tokenizer: "gpt2-base gpt2-medium gpt2-large gpt2-xl",
    GPTjTokenizer: "gptj-6b",
    T5Tokenizer: "t5-small t5-base t5-large t5-3b t5-11b",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_documented_identifiers_come_from_the_hub(
    family: Any, folders: dict[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options["revision"], options["local_files_only"], options["cache_dir"]))
        return str(folders[family])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name in DOCUMENTED[family].split():
        tokenizer = family.from_pretrained(name, revision="v1", local_files_only=True, cache_dir="cache")
        assert tokenizer.name == name
    assert sorted(family.repositories) == sorted(DOCUMENTED[family].split())
    assert asked == [
        (repository, "v1", True, "cache") for repository in map(family.repositories.get, DOCUMENTED[family].split())
    ]
    family.from_pretrained("someone/model")
    assert asked[-1] == ("someone/model", None, False, None)


def test_a_cached_repository_is_found_offline(
    vocabularies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--google-bert--bert-base-uncased"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(vocabularies / "bert", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tokenizer = BertTokenizer.from_pretrained("bert-base-uncased", cache_dir=tmp_path)
    assert tokenizer.tokenize("the cat") == ["the", "cat"]
    with pytest.raises(ValueError, match=r"'bert-base-cased'.*google-bert/bert-base-cased could not be fetched"):
        BertTokenizer.from_pretrained("bert-base-cased", cache_dir=tmp_path)


def test_failures_of_the_hub_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OfflineModeIsEnabled("outgoing traffic is disabled\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"at revision 'v2' could not be fetched \(outgoing traffic is disabled\)"):
        resolve.local_path("someone/model", {"a": "b/c"}, revision="v2")
