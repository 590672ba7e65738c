"""Finding the right tokenizer class for a directory, a file or an identifier."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from . import resolve
from .protocol import Tokenizer
from .vocabulary import read_json, read_tokens

_REPOSITORIES = {
    **resolve.BERT_REPOSITORIES,
    **resolve.GPT2_REPOSITORIES,
    **resolve.GPTJ_REPOSITORIES,
    **resolve.T5_REPOSITORIES,
}

_CLASS_OF_MODEL_TYPE = {
    "bert": "BertTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gptj": "GPTjTokenizer",
    "t5": "T5Tokenizer",
    "mt5": "T5Tokenizer",
    "cpm1": "CPM1Tokenizer",
    "cpm2": "CPM2Tokenizer",
}
_CLASS_OF_BACKEND = {"WordPiece": "BertTokenizer", "BPE": "GPT2Tokenizer", "Unigram": "T5Tokenizer"}

# GPT-J's files are GPT-2's with more tokens, and name GPT-2's class.
_GPTJ_TOKEN = "<|extratoken_1|>"

# What only the vocabularies of a class hold, the most telling first.
_CLASS_OF_TOKEN = {"[CLS]": "BertTokenizer", "<s_0>": "CPM2Tokenizer", "<eod>": "CPM1Tokenizer", "▁": "T5Tokenizer"}


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Tokenizer:
    """Load a tokenizer with the class it belongs to.

    The class is taken from ``model_type`` in ``config.json``, or found out from the vocabulary files.

    Args:
        name_or_path: A directory, a vocabulary file, a documented identifier such as ``"bert-base-uncased"``, or the
            ``organisation/name`` of a hub repository.
        revision: Branch, tag or commit of the hub repository.
        local_files_only: Only use local files and the hub's cache.
        cache_dir: Where downloads are kept, instead of the hub's usual cache.
        **options: Passed on to the class's ``from_pretrained``.

    Raises:
        ValueError: Nothing there is a tokenizer known here; the message says what was looked for and what was found.
    """
    path = resolve.local_path(
        name_or_path, _REPOSITORIES, revision=revision, local_files_only=local_files_only, cache_dir=cache_dir
    )
    name = _class_of_file(path) if path.is_file() else _class_of_folder(path)
    # Through the package, which imports Transformers only for the classes that need it.
    tokenizer: Any = getattr(import_module(__package__), name).from_pretrained(path, **options)
    if hasattr(tokenizer, "name_or_path"):
        tokenizer.name_or_path = os.fspath(name_or_path)
    loaded: Tokenizer = tokenizer
    return loaded


def _class_of_folder(folder: Path) -> str:
    config = folder / "config.json"
    if config.is_file():
        model_type = read_json(config).get("model_type")
        if model_type in _CLASS_OF_MODEL_TYPE:
            return _CLASS_OF_MODEL_TYPE[model_type]
        if model_type is not None:
            raise ValueError(
                f"{config}: there is no tokenizer here for `model_type` {model_type!r}; known are "
                f"{', '.join(_CLASS_OF_MODEL_TYPE)}. Load it with the class that fits its files, e.g. BertTokenizer"
            )
    looked_for = [folder / name for name in ("tokenizer.json", "vocab.txt", "vocab.json")]
    found = [file for file in looked_for if file.is_file()] + sorted(folder.glob("*.model"))
    if not found:
        raise ValueError(
            f"no tokenizer in {folder}: looked for `model_type` in config.json, tokenizer.json, vocab.txt, vocab.json "
            f"with merges.txt, and *.model; found {resolve.contents(folder)}. Give the directory of the vocabulary"
        )
    return _class_of_file(found[0])


def _class_of_file(file: Path) -> str:
    if file.name == "tokenizer.json":
        name = _CLASS_OF_BACKEND.get(read_json(file).get("model", {}).get("type"))
    elif file.suffix == ".json" or file.name == "merges.txt":
        name = "GPT2Tokenizer"
    else:
        tokens = set(read_tokens(file))
        name = next((name for token, name in _CLASS_OF_TOKEN.items() if token in tokens), None)
    if name is None:
        raise ValueError(
            f"{file} belongs to no tokenizer known here: looked for a WordPiece, BPE or Unigram tokenizer.json, or a "
            f"vocabulary with one of the tokens {', '.join(_CLASS_OF_TOKEN)}"
        )
    added = file.parent / "added_tokens.json"
    if name == "GPT2Tokenizer" and added.is_file() and _GPTJ_TOKEN in read_json(added):
        return "GPTjTokenizer"
    return name
