"""Tokenizers that are small enough to be obvious: each word or punctuation mark is a token."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAD, UNKNOWN, START, SEPARATOR, END, SENTINEL = range(6)
FIRST_WORD = 10
WORD = r"\w+|[^\w\s]"


class PlainTokenizer:
    """Only what the protocol `Tokenizer` of mc-tokenizers asks for; ids are given out as words appear."""

    name = "toy"
    fingerprint = "toy"
    pad_id = PAD
    eod_id = END

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self.ids.setdefault(word, FIRST_WORD + len(self.ids)) for word in re.findall(WORD, text)]

    def decode(self, token_ids: list[int]) -> str:
        words = {token: word for word, token in self.ids.items()}
        return " ".join(words.get(token, f"<{token}>") for token in token_ids)


class ToyTokenizer(PlainTokenizer):
    """As Transformers' fast tokenizers behave: called with lists, and with offsets and special tokens on request."""

    is_fast = True
    cls_token_id: int | None = START
    sep_token_id = SEPARATOR
    pad_token_id = PAD
    eos_token_id = END
    unk_token_id = UNKNOWN

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<extra_id_0>": SENTINEL}.get(token, self.ids.get(token, UNKNOWN))

    def __call__(
        self,
        text: str | Sequence[str],
        pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        if not isinstance(text, str):
            found = {"input_ids": [self.encode(one) for one in text]}
            if not return_offsets_mapping:
                return found
            return {**found, "offset_mapping": [[word.span() for word in re.finditer(WORD, one)] for one in text]}
        ids, types, special = [], [], []
        for number, segment in enumerate([text] if pair is None else [text, pair]):
            words = self.encode(segment)
            before = [START] if number == 0 and add_special_tokens else []
            behind = [SEPARATOR] if add_special_tokens else []
            ids += [*before, *words, *behind]
            types += [number] * (len(before) + len(words) + len(behind))
            special += [*[1] * len(before), *[0] * len(words), *[1] * len(behind)]
        return {"input_ids": ids, "token_type_ids": types, "special_tokens_mask": special}


def write_rows(folder: Path, task: str, split: str, text: str) -> Path:
    """Write a split's file into a task's folder; returns the folder to give to a data set."""
    file = folder / task / split
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(text, encoding="utf-8")
    return folder
