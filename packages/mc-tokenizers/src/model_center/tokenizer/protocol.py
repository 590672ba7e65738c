"""What the data packages need of a tokenizer, and nothing more."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer that data sets and preprocessing can rely on.

    Every tokenizer of this package implements it; one of your own needs only these names.
    """

    @property
    def name(self) -> str:
        """Short name for messages, e.g. ``"bert-base-uncased"``."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the vocabulary and of every option that changes ids.

        Two tokenizers with the same fingerprint give the same ids for every text, wherever their files lie, so it
        can key a cache of tokenized data.
        """
        ...

    @property
    def vocab_size(self) -> int:
        """Number of entries in the vocabulary file."""
        ...

    @property
    def eod_id(self) -> int:
        """Id that ends a document (BERT: ``[SEP]``)."""
        ...

    @property
    def pad_id(self) -> int:
        """Id that fills a batch up to one length."""
        ...

    def __len__(self) -> int:
        """Every id is smaller than this; it counts tokens added beyond the vocabulary file."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Turn ids back into text."""
        ...
