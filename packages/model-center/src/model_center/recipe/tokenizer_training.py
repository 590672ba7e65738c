"""Tokenizers trained on the text that a model will be trained on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import model_center.tokenizer
from model_center.tokenizer.unigram import train_unigram
from model_center.tools.reading import ReadOptions, plan_parts, read_part

from .run_directory import replacing

SIZES = range(300, 1 << 20)
_SENTINELS = [f"<extra_id_{number}>" for number in range(100)]


def train_tokenizer(
    inputs: Sequence[Path], folder: Path, model_type: str, size: int, options: ReadOptions | None = None
) -> Path:
    """Train a tokenizer of a model's family, unless the folder holds the one that would come out.

    GPT-2 gets byte-level BPE, BERT an uncased WordPiece vocabulary, T5 a unigram one with a hundred sentinels.
    The same documents give the same vocabulary files, byte by byte.

    Args:
        inputs: Text files, as `mc-preprocess` reads them.
        folder: Where the tokenizer is put; it appears complete or not at all.
        model_type: The family.
        size: Most entries of the vocabulary; a small text may give fewer.
        options: How the inputs are read.

    Returns:
        The folder.

    Raises:
        ValueError: The family has no tokenizer that can be trained here, `size` is out of range, or the folder holds
            another tokenizer, which stays.
    """
    if model_type not in _TRAINERS:
        raise ValueError(f"a tokenizer can be trained for {', '.join(_TRAINERS)}, not for {model_type}")
    if size not in SIZES:
        raise ValueError(f"the vocabulary's size must lie from {SIZES[0]} to {SIZES[-1]}, but is {size}")
    options = options or ReadOptions()
    described = json.dumps(
        {"model_type": model_type, "size": size, "options": vars(options), "inputs": [_state(path) for path in inputs]}
    )
    note = folder / "training.json"
    if note.exists() and note.read_text() == described:
        return folder
    if folder.exists():
        raise ValueError(
            f"{folder} holds a tokenizer of another text (or of files that have changed since), size or family, and a "
            "run may need it: give another folder with --data.path, or delete it"
        )
    with replacing(folder) as new:
        _TRAINERS[model_type](partial(texts_of, inputs, options), size, new)
        (new / "training.json").write_text(described)
    return folder


def _state(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def texts_of(inputs: Sequence[Path], options: ReadOptions) -> Iterator[str]:
    """Yield the documents of files, without blank ones."""
    for path in inputs:
        for part in plan_parts(path, options):
            for batch in read_part(part, options):
                yield from (text for text in batch.texts if text is not None)


def _byte_pairs(texts: Callable[[], Iterator[str]], size: int, folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt


def _word_pieces(texts: Callable[[], Iterator[str]], size: int, folder: Path) -> None:
    def train(size: int, first: list[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator(texts(), trainer)
        return tokenizer

    # The library numbers "##a", "##b" and so on in the order of a randomly seeded hash map, and of two equally
    # frequent pairs joins the one of the lower numbers. As "special" tokens they get their numbers here.
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = train(0, special).get_vocab()
    tokenizer = train(size, special + sorted(token for token in characters if token.startswith("##")))
    tokenizer.model.save(str(folder))  # vocab.txt


def _unigrams(texts: Callable[[], Iterator[str]], size: int, folder: Path) -> None:
    pieces = train_unigram(texts(), size, _SENTINELS)
    model_center.tokenizer.T5Tokenizer(vocab=pieces).save_pretrained(folder)  # tokenizer.json and its options


_TRAINERS: Mapping[str, Callable[[Callable[[], Iterator[str]], int, Path], None]] = {
    "gpt2": _byte_pairs,
    "bert": _word_pieces,
    "t5": _unigrams,
}
