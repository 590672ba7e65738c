"""From one line of text to the token sequences it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


EncodeMany = Callable[[Sequence[str]], list[list[int]]]


def many_encoder(tokenizer: Tokenizer) -> EncodeMany:
    """Return the fastest way this tokenizer has to encode many texts, without special tokens around them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: [tokenizer.encode(text) for text in texts]
    # Checkpoints may carry the lengths of their fine-tuning in tokenizer.json.
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


@dataclass
class CausalLMEncoder:
    """One document per line, for language models that read from left to right.

    Attributes:
        tokenizer: A tokenizer, or what `load_tokenizer` makes one of.
        append_eod: Whether the tokenizer's `eod_id` ends each document.
        max_length: Longest piece a document is cut into, in tokens; None keeps it whole, as Megatron does.
        min_length: Shorter pieces, with the rest of their document, are dropped.
    """

    tokenizer: Tokenizer | str
    append_eod: bool = True
    max_length: int | None = None
    min_length: int = 1
    _loaded: Tokenizer = field(init=False, repr=False, compare=False)
    _encode_many: EncodeMany = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < max(1, self.min_length):
            raise ValueError(
                f"`max_length` must be at least `min_length` ({self.min_length}) and 1, but is {self.max_length}"
            )
        self.initializer()

    def initializer(self) -> None:
        """Load the tokenizer."""
        if isinstance(self.tokenizer, str):
            # Loading brings in Transformers, which takes a second that `--help` need not wait for.
            from model_center.tokenizer import load_tokenizer

            self._loaded = load_tokenizer(self.tokenizer)
        else:
            self._loaded = self.tokenizer
        self._encode_many = many_encoder(self._loaded)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @property
    def vocab_size(self) -> int:
        """Every id is smaller than this."""
        return len(self._loaded)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the manifest tells of this encoder."""
        tokenizer = self._loaded
        options = {name: value for name, value in self.__getstate__().items() if name != "tokenizer"}
        return {
            "encoder": {"name": type(self).__name__, **options},
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": self.vocab_size,
            },
        }

    def encode(self, line: str) -> list[list[int]]:
        """Return the pieces of one line."""
        return self.encode_batch([line])[0]

    def encode_batch(self, lines: Sequence[str]) -> list[list[list[int]]]:
        """Return the pieces of each line."""
        end = [self._loaded.eod_id] if self.append_eod else []
        return [self._pieces(ids + end) for ids in self._encode_many([self.clean(line) for line in lines])]

    def clean(self, line: str) -> str:
        """Return the text that a line stands for."""
        return line

    def _pieces(self, ids: list[int]) -> list[list[int]]:
        length = self.max_length or max(1, len(ids))
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
