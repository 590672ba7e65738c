"""CPM-1's and CPM-2's tokenizers (sections 1.10.3 and 1.11.3): jieba's words, then longest match in a vocabulary."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, overload

from .cpm_vocabulary import SentencePieceModel, TokenList, Vocabulary
from .resolve import Layout, find_files, local_path
from .vocabulary import load_sentencepiece, read_tokens, require_tokens
from .word_cut import DICTIONARY

# The documented marks, and what CPM-1's original model and CPM-2's published vocabulary have in their place.
_OTHER_MARKS = {"</n>": "▃", "</_>": "▂"}


@dataclass(eq=False, repr=False)
class _CPMTokenizer:
    """What both tokenizers do."""

    layouts: ClassVar[tuple[Layout, ...]] = (("vocab.txt",), ("chinese_vocab.model",))

    vocab_file: str | os.PathLike[str]
    max_len: int | None = None
    q2b: bool = False
    eod_token: str = "<eod>"
    pad_token: str = "<pad>"
    unk_token: str = "<unk>"
    line_token: str = "</n>"
    space_token: str = "</_>"

    def __post_init__(self) -> None:
        if self.max_len is not None and self.max_len < 1:
            raise ValueError(f"`max_len` must be at least 1, or None for no limit, but is {self.max_len}")
        file = Path(self.vocab_file)
        self._tokens = read_tokens(file)
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        if len(self._ids) < len(self._tokens):
            index, token = next((i, token) for i, token in enumerate(self._tokens) if self._ids[token] != i)
            raise ValueError(
                f"{file}, line {index + 1}: the token {token!r} is there again in line {self._ids[token] + 1}. A token "
                "has one id: remove the line it was added in, or use the vocabulary the model was trained with"
            )
        for parameter in ("line_token", "space_token"):
            other = _OTHER_MARKS.get(getattr(self, parameter))
            if getattr(self, parameter) not in self._ids and other in self._ids:
                setattr(self, parameter, other)
        require_tokens(file, self._ids, self._special_tokens())
        marks = {self.space_token: " ", self.line_token: "\n"}
        self._vocabulary: Vocabulary
        if file.suffix == ".model":
            self._vocabulary = SentencePieceModel(load_sentencepiece(file), marks, half_width=self.q2b)
        else:
            self._vocabulary = TokenList(self._tokens, self.unk_token, marks, half_width=self.q2b)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> Self:
        """Load the vocabulary of a directory.

        Args:
            directory: A folder with ``vocab.txt`` or CPM-1's original ``chinese_vocab.model``, or one such file.
            **options: Constructor arguments.

        Raises:
            ValueError: The vocabulary is missing, or is not one of CPM's.
        """
        file, *_ = find_files(local_path(directory, {}), cls.layouts, cls.__name__)
        return cls(file, **options)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Copy the vocabulary into a directory, for `from_pretrained`; its options are not kept."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        file = Path(self.vocab_file)
        name = "chinese_vocab.model" if file.suffix == ".model" else "vocab.txt"
        (folder / name).write_bytes(file.read_bytes())

    def _special_tokens(self) -> dict[str, str]:
        """Parameter and token of each that the vocabulary must hold."""
        names = ("eod_token", "pad_token", "unk_token", "line_token", "space_token")
        return {name: getattr(self, name) for name in names}

    def encode(self, text: str) -> list[int]:
        """Encode a string into ids.

        Args:
            text: Any text. Spaces and line breaks become the ids of ``space_token`` and ``line_token``, and so do
                those tokens where they are written out.

        Returns:
            The ids, without special tokens around them; no more than ``max_len``, the first ones.
        """
        return self._vocabulary.encode(text)[: self.max_len]

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode ids into a string.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        return self._vocabulary.decode(self._known(tokens))

    def tokenize(self, text: str) -> list[str]:
        """Tokenize a string: the tokens of `encode`."""
        return self.convert_ids_to_tokens(self.encode(text))

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...  # type: ignore[overload-overlap]
    @overload
    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """Look up the id of one token, or of each of several; one that is not in the vocabulary has ``unk_id``."""
        if isinstance(tokens, str):
            return self._ids.get(tokens, self.unk_id)
        return [self._ids.get(token, self.unk_id) for token in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """Look up the token of one id, or of each of several."""
        if isinstance(ids, Iterable):
            return [self._tokens[index] for index in self._known(ids)]
        return self._tokens[self._known([ids])[0]]

    def _known(self, ids: Iterable[int]) -> list[int]:
        known = list(ids)
        if known and not 0 <= min(known) <= max(known) < len(self._tokens):
            unknown = next(index for index in known if not 0 <= index < len(self._tokens))
            raise ValueError(f"the ids of {self.name} are 0 to {len(self._tokens) - 1}, but one is {unknown}")
        return known

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""
        return dict(self._ids)

    def __len__(self) -> int:
        return self.vocab_size + 2

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary; ``len`` counts two more, the space and the line break themselves."""
        return len(self._tokens)

    @property
    def eod_id(self) -> int:
        """Id of ``eod_token``, which ends a document."""
        return self._ids[self.eod_token]

    @property
    def pad_id(self) -> int:
        """Id of ``pad_token``, which fills a batch."""
        return self._ids[self.pad_token]

    @property
    def unk_id(self) -> int:
        """Id of ``unk_token``, which stands for characters that the vocabulary lacks."""
        return self._ids[self.unk_token]

    @property
    def space_id(self) -> int:
        """Id of ``space_token``, which stands for a space."""
        return self._ids[self.space_token]

    @property
    def line_id(self) -> int:
        """Id of ``line_token``, which stands for a line break."""
        return self._ids[self.line_token]

    @property
    def name(self) -> str:
        """Name of the folder the vocabulary was read from."""
        return Path(self.vocab_file).resolve().parent.name

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of everything that decides ids (see `Tokenizer`)."""
        options = repr((DICTIONARY, self.max_len, self.eod_id, self.pad_id))
        return hashlib.sha256(self._vocabulary.content + options.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.vocab_file)!r}, vocab_size={self.vocab_size})"


class CPM1Tokenizer(_CPMTokenizer):
    """CPM-1's tokenizer (section 1.10.3).

    Args:
        vocab_file: Text file of one token a line, or CPM-1's original sentencepiece model (suffix ``.model``).
        max_len: The most ids that `encode` gives, or None for all.
        q2b: Whether to convert full-width letters, digits and punctuation to half-width.
        eod_token: Ends a document.
        pad_token: Fills a batch.
        unk_token: Stands for a character that the vocabulary lacks.
        line_token: Stands for a line break; ``▃`` where the vocabulary has that in place of the default.
        space_token: Stands for a space; ``▂`` where the vocabulary has that in place of the default.

    Raises:
        ValueError: The vocabulary cannot be read, or lacks a special token; or ``max_len`` is not positive.
    """


class CPM2Tokenizer(_CPMTokenizer):
    """CPM-2's tokenizer (section 1.11.3).

    Args:
        vocab_file: Text file of one token a line.
        max_sentinels: How many of the tokens ``<s_0>``, ``<s_1>``, … stand for masked spans.
        max_len: The most ids that `encode` gives, or None for all.
        q2b: Whether to convert full-width letters, digits and punctuation to half-width.
        sod_token: Starts the decoder's input.
        eod_token: Ends a document.
        pad_token: Fills a batch.
        unk_token: Stands for a character that the vocabulary lacks.
        line_token: Stands for a line break; ``▃`` where the vocabulary has that in place of the default.
        space_token: Stands for a space; ``▂`` where the vocabulary has that in place of the default.

    Raises:
        ValueError: The vocabulary cannot be read, or lacks a special token or sentinel; or a number is out of range.
    """

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        max_sentinels: int = 190,
        max_len: int | None = None,
        q2b: bool = False,
        sod_token: str = "<s>",
        eod_token: str = "<eod>",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        line_token: str = "</n>",
        space_token: str = "</_>",
    ) -> None:
        self.max_sentinels = max_sentinels
        self.sod_token = sod_token
        super().__init__(vocab_file, max_len, q2b, eod_token, pad_token, unk_token, line_token, space_token)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_sentinels < 0:
            raise ValueError(f"`max_sentinels` must not be negative, but is {self.max_sentinels}")
        for number in range(self.max_sentinels):
            if f"<s_{number}>" not in self._ids:
                raise ValueError(
                    f"{self.vocab_file}: the vocabulary lacks the sentinel <s_{number}>, and `max_sentinels` is "
                    f"{self.max_sentinels}. Lower it to {number}, or use a vocabulary with all sentinels"
                )

    def _special_tokens(self) -> dict[str, str]:
        return {"sod_token": self.sod_token, **super()._special_tokens()}

    @property
    def sod_id(self) -> int:
        """Id of ``sod_token``, which starts the decoder's input."""
        return self._ids[self.sod_token]

    @property
    def sentinel_list(self) -> list[int]:
        """Ids of the sentinels ``<s_0>``, ``<s_1>``, …, which stand for masked spans."""
        return [self._ids[f"<s_{number}>"] for number in range(self.max_sentinels)]
