"""Tokenizers of the model families.

Names are imported on first use: Transformers takes over a second to import, and nobody who only wants CPM's
tokenizers should wait for it.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .protocol import Tokenizer

if TYPE_CHECKING:
    from .cpm import CPM1Tokenizer, CPM2Tokenizer
    from .loading import load_tokenizer
    from .pretrained import BertTokenizer, GPT2Tokenizer, GPTjTokenizer, T5Tokenizer

__version__ = version("mc-tokenizers")
__all__ = [
    "BertTokenizer",
    "CPM1Tokenizer",
    "CPM2Tokenizer",
    "GPT2Tokenizer",
    "GPTjTokenizer",
    "T5Tokenizer",
    "Tokenizer",
    "__version__",
    "load_tokenizer",
]

_HOMES = {
    "BertTokenizer": ".pretrained",
    "CPM1Tokenizer": ".cpm",
    "CPM2Tokenizer": ".cpm",
    "GPT2Tokenizer": ".pretrained",
    "GPTjTokenizer": ".pretrained",
    "T5Tokenizer": ".pretrained",
    "load_tokenizer": ".loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
