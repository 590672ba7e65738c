"""Cutting Chinese text into words as jieba's accurate mode does, in native code.

The reference is ``jieba.cut(text)`` (https://github.com/fxsjy/jieba). The words come from rjieba, jieba's port to Rust
with the same dictionary, the same sums of log probabilities and the same choice among equal ones. It differs in which
characters it takes for Chinese, and in how it cuts runs of Latin letters, digits and signs such as ``1-2`` or ``U.S.``.
Both are done here as jieba does them, so that the cuts are jieba's.
"""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator

DICTIONARY = "jieba 0.42"
"""What decides the cuts, for fingerprints."""

# What may hold words; everything else is cut into characters, but for \r\n.
_BLOCK = re.compile(r"([\u4E00-\u9FD5a-zA-Z0-9+#&._%\-]+)")
_CHARACTER = re.compile(r"\r\n|.", re.DOTALL)
_SIGN = re.compile(r"[+#&._%\-]")
_LATIN = re.compile(r"([a-zA-Z0-9]+(?:\.\d+)?%?)")
# The words of the dictionary that are not Chinese at all.
_LATIN_WORDS = frozenset({"AT&T", "C#", "C++", "c#", "c++"})


def split(text: str) -> list[str]:
    """Split a text into parts that `cut_part` cuts independently of each other."""
    return _BLOCK.split(text)


def cut_part(part: str) -> list[str]:
    """Cut one part of `split` into words."""
    if not _BLOCK.match(part):
        return _CHARACTER.findall(part)
    words = _dictionary()(part)
    return list(_cut_signs(words)) if _SIGN.search(part) else words


def cut(text: str) -> list[str]:
    """Cut a text into the words that ``jieba.cut`` gives; joined, they are the text again."""
    return [word for part in split(text) for word in cut_part(part)]


def _cut_signs(words: Iterable[str]) -> Iterator[str]:
    """Join neighbouring words that are all Latin, and cut them again by jieba's rule."""
    run = ""
    for word in words:
        if word.isascii() and word not in _LATIN_WORDS:
            run += word
            continue
        yield from filter(None, _LATIN.split(run))
        run = ""
        yield word
    yield from filter(None, _LATIN.split(run))


@functools.cache
def _dictionary() -> Callable[[str], list[str]]:
    """The function that cuts blocks; the process reads its dictionary once, when the first block is cut."""
    try:
        import rjieba
    except ImportError:
        # No wheel of rjieba for this machine. jieba gives the same words, more slowly.
        import jieba

        jieba.setLogLevel(logging.WARNING)
        cut_words: Callable[[str], list[str]] = jieba.lcut
        return cut_words
    return rjieba.cut
