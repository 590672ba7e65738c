"""Texts to ids: many at a time, shortened in the one place that may be shortened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from .template import Part

Side = Literal["left", "right"]


def token_id(tokenizer: Any, *names: str) -> int:
    """The id of a special token that a family cannot do without.

    Args:
        tokenizer: The tokenizer.
        names: Attributes that may hold it, in order of preference.

    Raises:
        ValueError: The vocabulary has no such token.
    """
    for name in names:
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(
        f"{describe(tokenizer)} has no {names[0].removesuffix('_id')}: the vocabulary lacks this special token; "
        "use the vocabulary the model was trained with"
    )


def vocabulary_id(tokenizer: Any, token: str) -> int:
    """The id of a token that must be in the vocabulary.

    Raises:
        ValueError: It is not.
    """
    found: int | None = tokenizer.convert_tokens_to_ids(token)
    unknown = [getattr(tokenizer, name, None) for name in ("unk_token_id", "unk_id")]
    if found is None or found in unknown:
        raise ValueError(
            f"{describe(tokenizer)} has no {token}: the vocabulary lacks this special token; "
            "use the vocabulary the model was trained with"
        )
    return found


def describe(tokenizer: Any) -> str:
    """A tokenizer's name, for messages."""
    name = getattr(tokenizer, "name", None) or getattr(tokenizer, "name_or_path", None)
    return f"tokenizer {name!r}" if name else f"the tokenizer ({type(tokenizer).__name__})"


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens."""
    distinct = list(dict.fromkeys(texts))
    if not is_fast(tokenizer):
        ids = [list(tokenizer.encode(text)) for text in distinct]
    else:
        ids = _tokenize(tokenizer, distinct)["input_ids"]
    if len(distinct) == len(texts):
        return ids
    known = dict(zip(distinct, ids, strict=True))
    return [known[text] for text in texts]


def _tokenize(tokenizer: Any, texts: Sequence[str], **options: bool) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )


def is_fast(tokenizer: Any) -> bool:
    """Whether it is one of Transformers' fast tokenizers, which say where in the text each token comes from."""
    return bool(getattr(tokenizer, "is_fast", False)) and callable(tokenizer)


def encode_parts(
    tokenizer: Any, rows: Sequence[tuple[Part, ...]], room: Sequence[int], side: Side, places: Sequence[str]
) -> list[list[list[int]]]:
    """The ids of every part of every row, shortened to the room there is.

    Args:
        tokenizer: The tokenizer.
        rows: The parts of each row. All rows have the same number of parts.
        room: How many tokens the parts of each row may have in all.
        side: The side on which the flexible text of a row loses tokens.
        places: File and line of each row, for messages.

    Raises:
        ValueError: A row does not fit even without its flexible text.
    """
    columns = [encode_texts(tokenizer, [row[number].text for row in rows]) for number in range(len(rows[0]))]
    encoded = [list(parts) for parts in zip(*columns, strict=True)]
    excess = [sum(map(len, parts)) - limit for parts, limit in zip(encoded, room, strict=True)]
    for column in range(len(columns)):
        long = [number for number, row in enumerate(rows) if excess[number] > 0 and row[column].flexible]
        known = [(rows[number][column], encoded[number][column]) for number in long]
        for number, (ids, start, end) in zip(long, _locate(tokenizer, known), strict=True):
            excess[number] += len(ids) - len(encoded[number][column])
            taken = max(0, min(excess[number], end - start))
            first = start if side == "left" else end - taken
            encoded[number][column] = ids[:first] + ids[first + taken :]
            excess[number] -= taken
    for surplus, where in zip(excess, places, strict=True):
        if surplus > 0:
            raise ValueError(
                f"{where}: the text is {surplus} tokens too long even without the part that may be shortened; "
                "raise the maximum length, or leave the row out"
            )
    return encoded


def _locate(tokenizer: Any, parts: Sequence[tuple[Part, list[int]]]) -> list[tuple[list[int], int, int]]:
    """Say which ids (from, to) of each part, given with its ids, are its flexible text."""
    if all(part.flexible == (0, len(part.text)) for part, _ in parts):
        return [(ids, 0, len(ids)) for _, ids in parts]
    if not is_fast(tokenizer):
        return [_locate_by_pieces(tokenizer, part) for part, _ in parts]
    offsets_of_parts = _tokenize(tokenizer, [part.text for part, _ in parts], return_offsets_mapping=True)
    located = []
    for (part, ids), offsets in zip(parts, offsets_of_parts["offset_mapping"], strict=True):
        start, end = part.flexible or (0, 0)
        # A token that reaches over the border belongs to the text that must stay, unless only its space does.
        inside = [
            number
            for number, (first, last) in enumerate(offsets)
            if start < last <= end and (first >= start or part.text[first:start].isspace())
        ]
        located.append((ids, inside[0], inside[-1] + 1) if inside else (ids, 0, 0))
    return located


def _locate_by_pieces(tokenizer: Any, part: Part) -> tuple[list[int], int, int]:
    """The same for a tokenizer that does not say where in the text its tokens are; the ids may differ a little."""
    start, end = part.flexible or (0, 0)
    pieces = part.text[:start], part.text[start:end], part.text[end:]
    before, flexible, after = (list(tokenizer.encode(piece)) if piece else [] for piece in pieces)
    return before + flexible + after, len(before), len(before) + len(flexible)


@dataclass(frozen=True)
class SpecialTokens:
    """What an encoder's tokenizer puts around the segments of an input.

    Attributes:
        runs: Ids of the special tokens: before the first segment, and behind each segment.
        types: The token type of each segment and of the special tokens behind it; None if the tokenizer gives none.
    """

    runs: tuple[tuple[int, ...], ...]
    types: tuple[int, ...] | None

    @property
    def count(self) -> int:
        """Number of special tokens in an input."""
        return sum(len(run) for run in self.runs)

    def wrap(self, segments: Sequence[Sequence[int]]) -> tuple[list[int], list[int] | None]:
        """Ids and token types of an input made of these segments."""
        ids = list(self.runs[0])
        lengths = []
        for segment, run in zip(segments, self.runs[1:], strict=True):
            ids += [*segment, *run]
            lengths.append(len(segment) + len(run))
        if self.types is None:
            return ids, None
        lengths[0] += len(self.runs[0])
        return ids, [kind for kind, length in zip(self.types, lengths, strict=True) for _ in range(length)]


def special_tokens(tokenizer: Any, segments: int) -> SpecialTokens:
    """Learn from a trial input what a tokenizer puts around this number of segments.

    Raises:
        ValueError: It is not a fast tokenizer, or adds no special tokens.
    """
    if not is_fast(tokenizer):
        raise ValueError(f"encoders need one of Transformers' fast tokenizers, but got {describe(tokenizer)}")
    token_id(tokenizer, "cls_token_id")
    token_id(tokenizer, "sep_token_id")
    trial = tokenizer(*["a", "b"][:segments], return_special_tokens_mask=True)
    runs: list[tuple[int, ...]] = []
    types = []
    marked = zip(trial["special_tokens_mask"], trial["input_ids"], strict=True)
    position = 0
    for special, run in groupby(marked, key=lambda pair: bool(pair[0])):
        ids = tuple(token for _, token in run)
        if special:
            runs.append(ids)
        elif "token_type_ids" in trial:
            types.append(trial["token_type_ids"][position])
        position += len(ids)
    if len(runs) != segments + 1:
        raise ValueError(
            f"{describe(tokenizer)} does not put special tokens around {segments} segments: an encoder's input "
            "needs them"
        )
    return SpecialTokens(tuple(runs), tuple(types) if types else None)
