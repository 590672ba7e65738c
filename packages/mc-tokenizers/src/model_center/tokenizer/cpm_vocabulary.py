"""CPM's two kinds of vocabulary: longest match in a list of tokens, and a sentencepiece model.

Both get text cut into words; spaces and line breaks are tokens of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

from sentencepiece import SentencePieceProcessor

from .word_cut import cut, cut_part, split

Value = TypeVar("Value")

# Full-width forms as CPM-1 knows them: ASCII's, and the half-width stop and comma its vocabulary holds in their place.
# The ideographic space stays what it is, an unknown character.
TO_HALF_WIDTH = {full: full - 0xFEE0 for full in range(0xFF01, 0xFF5F)} | str.maketrans("。、", "｡､")


class Vocabulary(Protocol):
    """How a text becomes ids, and ids a text."""

    @property
    def content(self) -> bytes:
        """What decides the ids, for fingerprints."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids, which must be in the vocabulary, into text."""
        ...


class Memo(dict[str, Value], Generic[Value]):
    """Remembers what a function gave for short strings; a full one starts afresh."""

    def __init__(self, function: Callable[[str], Value], max_length: int = 12, max_entries: int = 1 << 17) -> None:
        super().__init__()
        self.function = function
        self.max_length = max_length
        self.max_entries = max_entries

    def __missing__(self, key: str) -> Value:
        value = self.function(key)
        if len(key) <= self.max_length:
            if len(self) >= self.max_entries:
                self.clear()
            self[key] = value
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.max_length, self.max_entries)  # a copy starts empty


class TokenList:
    """A list of tokens: each word becomes its longest match from the left, and again behind that.

    Args:
        tokens: The vocabulary; the place of a token is its id.
        unknown: Token for a character that begins no token.
        marks: Tokens and the characters (space, line break) they stand for.
        half_width: Whether to convert full-width forms first.
    """

    def __init__(self, tokens: Sequence[str], unknown: str, marks: Mapping[str, str], *, half_width: bool) -> None:
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ids |= {character: self.ids[mark] for mark, character in marks.items()}
        self.unknown = self.ids[unknown]
        self.marks = dict(marks)
        self.half_width = half_width
        self.texts = [marks.get(token, token) for token in tokens]
        self._max_length = max(map(len, tokens))
        self._ids_of_word = Memo(self._match)
        self._ids_of_part = Memo(self._match_part)

    @property
    def content(self) -> bytes:
        """What decides the ids, for fingerprints."""
        return repr((self.ids, self.marks, self.unknown, self.half_width)).encode()

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids. Marks that are written out stand for the space and the line break."""
        for mark, character in self.marks.items():
            text = text.replace(mark, character)
        return list(chain.from_iterable(map(self._ids_of_part.__getitem__, split(text))))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text."""
        return "".join([self.texts[index] for index in ids])

    def _match_part(self, part: str) -> tuple[int, ...]:
        return tuple(chain.from_iterable(map(self._ids_of_word.__getitem__, cut_part(part))))

    def _match(self, word: str) -> tuple[int, ...]:
        if self.half_width:
            word = word.translate(TO_HALF_WIDTH)
        index = self.ids.get(word)
        if index is not None:
            return (index,)
        ids = []
        start = 0
        while start < len(word):
            for end in range(min(len(word), start + self._max_length), start, -1):
                index = self.ids.get(word[start:end])
                if index is not None:
                    break
            else:
                index = self.unknown
            ids.append(index)
            start = end
        return tuple(ids)


class SentencePieceModel:
    """CPM-1's original vocabulary (https://github.com/TsinghuaAI/CPM-1-Generate): a sentencepiece model.

    Words are parted by spaces before sentencepiece sees them; the text's own spaces and line breaks are marks.

    Args:
        processor: The model.
        marks: Pieces and the characters (space, line break) they stand for.
        half_width: Whether to convert full-width forms first. (The model normalises most of them itself.)
    """

    def __init__(self, processor: SentencePieceProcessor, marks: Mapping[str, str], *, half_width: bool) -> None:
        self.processor = processor
        self.marks = dict(marks)
        self.forms: dict[int, int | str] = {ord(character): mark for mark, character in marks.items()}
        if half_width:
            self.forms |= TO_HALF_WIDTH

    @property
    def content(self) -> bytes:
        """What decides the ids, for fingerprints."""
        return self.processor.serialized_model_proto() + repr(self.forms).encode()

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids."""
        ids: list[int] = self.processor.encode(" ".join([word.translate(self.forms) for word in cut(text)]))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text."""
        text: str = self.processor.decode(list(ids))
        text = text.replace(" ", "")
        for mark, character in self.marks.items():
            text = text.replace(mark, character)
        return text
