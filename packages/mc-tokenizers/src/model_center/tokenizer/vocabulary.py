"""Reading and checking vocabulary files, with errors that name file, line and remedy."""

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def read_tokens(file: Path) -> list[str]:
    """Read the tokens of any kind of vocabulary file, told by its suffix.

    Args:
        file: A sentencepiece model (``.model``), Hugging Face's ``tokenizer.json`` or ``vocab.json``, or a text file of
            one token a line.

    Returns:
        The tokens; those of text files and sentencepiece models in the order of their ids.

    Raises:
        ValueError: The file cannot be read as what its suffix says.
    """
    if file.suffix == ".model":
        processor = load_sentencepiece(file)
        return [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    if file.suffix != ".json":
        return _read_lines(file)
    content = read_json(file)
    model = content.get("model")
    if not isinstance(model, dict):
        return list(content)
    vocabulary = model.get("vocab", [])
    tokens = [entry[0] for entry in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)
    return tokens + [entry["content"] for entry in content.get("added_tokens", [])]


def _read_lines(file: Path) -> list[str]:
    text = _read_text(file, "a vocabulary of one token a line")
    if not text.strip():
        raise ValueError(f"{file}: the vocabulary is empty; expected one token a line")
    return text.removesuffix("\n").split("\n")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file is missing, is not text, or is not a JSON object; names file and line.
    """
    try:
        value = json.loads(_read_text(file, "a JSON object"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}). Fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def check_merges(file: Path) -> None:
    """Raise ValueError unless every line of a BPE ``merges.txt`` holds two tokens."""
    for number, line in enumerate(_read_text(file, "BPE merges, two tokens a line").split("\n"), 1):
        if line and not line.startswith("#version") and len(line.split(" ")) != 2:
            raise ValueError(
                f"{file}, line {number}: expected two tokens with a space between them, found {line!r}. Fetch the "
                "file again, or give the merges.txt that belongs to this vocab.json"
            )


def _read_text(file: Path, expected: str) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot read {expected} ({error.strerror})") from error
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        kind = "a sentencepiece model" if _is_sentencepiece_model(file) else "not UTF-8 text"
        raise ValueError(
            f"{file}, line {line}: expected {expected}, but this is {kind}. Give the text file, or name a "
            "sentencepiece model with the suffix .model and use a class that reads one"
        ) from error


def require_tokens(file: Path, vocabulary: Collection[str], tokens: Mapping[str, str]) -> None:
    """Check that a vocabulary holds the special tokens.

    Args:
        file: Where the vocabulary was read, for the message.
        vocabulary: Its tokens.
        tokens: Parameter name to token, e.g. ``{"unk_token": "<unk>"}``.

    Raises:
        ValueError: Some are missing; all of them are named, each with the nearest tokens there are.
    """
    problems = []
    for parameter, token in tokens.items():
        if token not in vocabulary:
            near = difflib.get_close_matches(token, [word for word in vocabulary if word[:1] in "<[|▁▂▃"], n=2)
            problems.append(f"`{parameter}` is {token!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
    if problems:
        raise ValueError(
            f"{file}: the vocabulary of {len(vocabulary)} tokens lacks the special tokens {'; '.join(problems)}. Add "
            "each on a line of its own, pass the names it uses instead, or use the tokenizer class it was made for"
        )


def load_sentencepiece(file: Path) -> "SentencePieceProcessor":
    """Load a sentencepiece model.

    Raises:
        ValueError: The file is missing, or is not a sentencepiece model.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{file} is not a sentencepiece model ({str(error).splitlines()[0]}). Give the model file that "
            "sentencepiece trained, or name a plain vocabulary of one token a line with the suffix .txt"
        ) from error


def _is_sentencepiece_model(file: Path) -> bool:
    try:
        load_sentencepiece(file)
    except ValueError:
        return False
    return True
