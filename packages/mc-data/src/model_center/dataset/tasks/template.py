"""Texts with fields in braces, rendered so that one field can later give way to a length limit."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

MASK = "mask"
"""The name of the slot for the answer in a prompt: ``"{passage}. {question}?{mask}"``."""


@dataclass(frozen=True)
class Part:
    """A rendered text.

    Attributes:
        text: The text.
        flexible: Characters `[start, end)` that may be shortened to meet a length limit; None if none may.
    """

    text: str
    flexible: tuple[int, int] | None = None


@dataclass(frozen=True)
class Template:
    """A text with fields in braces, as for `str.format` (``{{`` is a literal brace), and at most one ``{mask}``."""

    text: str

    @cached_property
    def pieces(self) -> tuple[tuple[str, str | None], ...]:
        """Pairs of literal text and the field that follows it (None at the end).

        Raises:
            ValueError: The braces do not match, or a field has a format or a conversion.
        """
        pieces = []
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"template {self.text!r}: {error}") from error
        for literal, field, format_spec, conversion in parsed:
            if format_spec or conversion or field == "":
                raise ValueError(f"template {self.text!r}: a field is a plain name in braces, such as {{text}}")
            pieces.append((literal, field))
        return tuple(pieces)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, in order, ``mask`` among them."""
        return tuple(field for _, field in self.pieces if field is not None)

    def render(self, values: Mapping[str, str], flexible: str | None = None) -> tuple[Part, ...]:
        """Fill in the fields.

        Args:
            values: The text of every field.
            flexible: The field that may be shortened.

        Returns:
            The text before the mask and the text after it; only one part if there is no mask.
        """
        parts: list[Part] = []
        text, span = "", None
        for literal, field in self.pieces:
            text += literal
            if field == MASK:
                parts.append(Part(text, span))
                text, span = "", None
            elif field is not None:
                start = len(text)
                text += values[field]
                if field == flexible:
                    span = (start, len(text))
        return (*parts, Part(text, span))
