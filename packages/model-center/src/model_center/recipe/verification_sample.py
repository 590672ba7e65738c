"""The input on which a checkpoint is compared: sample text through its tokenizer, or random ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from model_center.model.config import Config
from model_center.model.output_projection import IGNORED
from model_center.model.seq2seq import Seq2SeqConfig
from model_center.model.stack_model import StackConfig
from model_center.tokenizer import load_tokenizer
from model_center.tools.reading import ReadOptions

from .pretraining_text import text_files
from .tokenizer_training import texts_of

DEFAULT_TEXT = "sample:shakespeare"
SHORTEST = 4
"""Tokens of the shortest row."""


@dataclass(frozen=True)
class Sample:
    """A ragged batch, padded on the right.

    Attributes:
        inputs: Keyword arguments of the forward of either side.
        labels: (rows, length), the token after each position of the input, or of the decoder's if there is one; -100
            where there is none.
        description: Where it comes from.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    description: str

    @property
    def encoder_positions(self) -> Tensor:
        """Where the input is not padding, (rows, length)."""
        return self.inputs["attention_mask"].bool()

    @property
    def positions(self) -> Tensor:
        """Where the output is not padding, (rows, length)."""
        return self.inputs.get("decoder_attention_mask", self.inputs["attention_mask"]).bool()


@dataclass(frozen=True)
class SampleOptions:
    """What a sample should be.

    Attributes:
        folders: Where a tokenizer may be; the first one that is found is used.
        text: File of sample text; by default the text that comes with this package.
        rows: Number of rows.
        length: Tokens of the first row; the others are shorter.
        seed: Seed of random ids, which are used where there is no tokenizer and no text is given.
        padding_id: What rows are filled up with; it is not among the random ids, since Transformers does not train its
            embedding.
    """

    folders: Sequence[Path]
    text: str | None
    rows: int
    length: int
    seed: int
    padding_id: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [max(SHORTEST, self.length - row * self.length // (2 * self.rows)) for row in range(self.rows)]


def make_sample(config: Config, options: SampleOptions) -> Sample:
    """Make the input for a model.

    Raises:
        ValueError: The text is missing or too short, or there is no tokenizer for it, or not one of this model.
    """
    count, folders, text = sum(options.lengths), options.folders, options.text
    vocabulary = config.vocab_size - config.padding_ids
    folder = next((folder for folder in folders if has_tokenizer(folder)), None)
    if folder is None:
        if text is not None:
            raise ValueError(f"text needs a tokenizer, but there is none in {' or '.join(map(str, folders))}")
        generator = torch.Generator().manual_seed(options.seed)
        drawn = torch.randint(0, vocabulary - 1, (count,), generator=generator)
        ids = (drawn + (drawn >= options.padding_id)).tolist()
        description = f"{options.rows} rows of random ids, seed {options.seed}"
    else:
        ids = list(_encoded(folder, text or DEFAULT_TEXT, count))
        description = f"{text or DEFAULT_TEXT} through the tokenizer of {folder}"
        if len(ids) < count:
            raise ValueError(f"{text} must have {count} tokens for {options.rows} rows, but has {len(ids)}")
        if max(ids) >= vocabulary:
            raise ValueError(
                f"the tokenizer of {folder} must be that of the model, whose vocabulary has {vocabulary} entries, but "
                f"gives the id {max(ids)}"
            )
    remaining = iter(ids)
    rows = [[next(remaining) for _ in range(length)] for length in options.lengths]
    inputs = _padded(rows, "", options.padding_id)
    targets: Sequence[Sequence[int]] = rows
    if isinstance(config, Seq2SeqConfig):
        targets = [row[len(row) // 2 :] for row in rows]
        inputs |= _padded(targets, "decoder_", options.padding_id)
    if isinstance(config, StackConfig) and config.add_cross_attention:
        generator = torch.Generator().manual_seed(options.seed)
        states = torch.randn(*inputs["input_ids"].shape, config.dim_model, generator=generator)
        inputs |= {"encoder_hidden_states": states, "encoder_attention_mask": inputs["attention_mask"]}
    labels = _stacked([[*row[1:], IGNORED] for row in targets], IGNORED)
    if config.cls_head is not None:
        labels = torch.where(labels == IGNORED, labels, labels % config.cls_head)
    return Sample(inputs, labels, description)


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a vocabulary."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")
    return any((folder / name).is_file() for name in names)


def _encoded(folder: Path, text: str, count: int) -> Iterator[int]:
    """The first ids of a text."""
    tokenizer = load_tokenizer(folder, local_files_only=True)
    lines = (line for document in texts_of(text_files(text), ReadOptions()) for line in document.splitlines())
    yield from islice((token_id for line in lines for token_id in tokenizer.encode(line)), count)


def _padded(rows: Sequence[Sequence[int]], prefix: str, padding_id: int) -> dict[str, Tensor]:
    mask = _stacked([[1] * len(row) for row in rows], 0)
    return {f"{prefix}input_ids": _stacked(rows, padding_id), f"{prefix}attention_mask": mask}


def _stacked(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])
