"""From one line of text to the token sequences it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from model_center.tokenizer import Tokenizer


@runtime_checkable
class Encoder(Protocol):
    """What `tokenize` needs (section 1.5.2): an object that turns a line into sequences of token ids.

    It is pickled into every worker process. Beside `encode` it may have

    - `initializer()`, called once in each worker before the first line, to load what should not be pickled;
    - `encode_batch(lines)`, the list of `encode(line)` of many lines, where that is faster;
    - `vocab_size`, from which the dtype is chosen, and `provenance`, a mapping of JSON values for the manifest by which
      an interrupted run knows its own parts again.
    """

    def encode(self, line: str) -> Sequence[Sequence[int]]:
        """Return the pieces of one line, which together are one document; none drops the line."""
        ...


class ManyTexts:
    """The fastest way a tokenizer has to encode many texts, without special tokens around them.

    Of a fast tokenizer it keeps only the part in Rust, which workers can unpickle without importing Transformers.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer if self._backend is None else None
        if self._backend is not None:
            # Checkpoints may carry the lengths of their fine-tuning in tokenizer.json.
            self._backend.no_truncation()
            self._backend.no_padding()
            # The part in Rust forgets this one option when it is pickled, and calls of the tokenizer may change it.
            self._split_special_tokens = getattr(tokenizer, "split_special_tokens", self._backend.encode_special_tokens)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        if self._tokenizer is not None:
            return [self._tokenizer.encode(text) for text in texts]
        self._backend.encode_special_tokens = self._split_special_tokens
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


@dataclass
class CausalLMEncoder:
    """One document per line, for language models that read from left to right.

    Attributes:
        tokenizer: A tokenizer, or what `load_tokenizer` makes one of.
        append_eod: Whether the tokenizer's `eod_id` ends each document.
        max_length: Longest piece a document is cut into, in tokens; None keeps it whole, as Megatron does.
        min_length: Shorter pieces, with the rest of their document, are dropped.
        vocab_size: Every id is smaller than this.
        provenance: What the manifest tells of this encoder.
    """

    tokenizer: Tokenizer | str
    append_eod: bool = True
    max_length: int | None = None
    min_length: int = 1
    vocab_size: int = field(init=False)
    provenance: Mapping[str, Any] = field(init=False, repr=False)
    _encode_many: ManyTexts = field(init=False, repr=False, compare=False)
    _end: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < max(1, self.min_length):
            raise ValueError(
                f"`max_length` must be at least `min_length` ({self.min_length}) and 1, but is {self.max_length}"
            )
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str):
            # Loading brings in Transformers, which takes a second that `--help` need not wait for.
            from model_center.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(tokenizer)
        self.vocab_size = len(tokenizer)
        options = {name: getattr(self, name) for name in ("append_eod", "max_length", "min_length")}
        self.provenance = {
            "encoder": {"name": type(self).__name__, **options},
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": self.vocab_size,
            },
        }
        self._encode_many = ManyTexts(tokenizer)
        self._end = [tokenizer.eod_id] if self.append_eod else []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"tokenizer": self.provenance["tokenizer"]["name"]}

    def encode(self, line: str) -> list[list[int]]:
        """Return the pieces of one line."""
        return self.encode_batch([line])[0]

    def encode_batch(self, lines: Sequence[str]) -> list[list[list[int]]]:
        """Return the pieces of each line."""
        documents = [ids + self._end for ids in self._encode_many([self.clean(line) for line in lines])]
        if self.max_length is None:
            return [[ids] if len(ids) >= self.min_length else [] for ids in documents]
        return [self._pieces(ids, self.max_length) for ids in documents]

    def clean(self, line: str) -> str:
        """Return the text that a line stands for."""
        return line

    def _pieces(self, ids: list[int], length: int) -> list[list[int]]:
        pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        return [piece for piece in pieces if len(piece) >= self.min_length]


@dataclass
class CPM1Encoder(CausalLMEncoder):
    """The encoder of section 1.5.2.

    Spaces around a line go, `<n>` becomes a line break, `<eod>` ends the document, and the ids are cut into pieces of
    512, of which those under 32 are dropped.
    """

    max_length: int | None = 512
    min_length: int = 32

    def clean(self, line: str) -> str:
        """Return the text that a line stands for."""
        return line.strip().replace("<n>", "\n")
