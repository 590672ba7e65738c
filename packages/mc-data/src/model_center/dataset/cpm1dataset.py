"""Task data sets for CPM-1.

An item holds ``input_tokens`` (``<s>``, then the prompt with the padding token in its slot), ``input_length``,
``input_context`` (True everywhere but in the slot: what every position may attend to), ``input_span`` (0: one text),
``targets`` (the class) and ``index`` (1 where the answer is predicted, before the slot). Compare the logits of the
words in the data set's `verbalizer` there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .tasks.catalogue import LCQMC
from .tasks.columns import Encoded, Layout
from .tasks.dataset import Registry
from .tasks.encoding import token_id, vocabulary_id
from .tasks.prompts import PromptDataset
from .tasks.reading import Example

__all__ = ["DATASET", "CPM1Dataset"]

START = "<s>"


@dataclass(eq=False, repr=False)
class CPM1Dataset(PromptDataset):
    """A task as input for CPM-1 (see `PromptDataset`).

    Args:
        max_length: Maximum number of tokens of an item.
    """

    max_length: int = 512

    family = "cpm1"
    limits = ("max_length",)
    label_entry = "targets"

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Turn examples into model input."""
        self.require_classes()
        start = vocabulary_id(self.tokenizer, START)
        slot = token_id(self.tokenizer, "pad_id", "pad_token_id")
        prompts = self.encode_prompts(examples, [self.max_length - 2] * len(examples))
        encoded = []
        for (before, behind), example in zip(prompts, examples, strict=True):
            ids = [start, *before, slot, *behind]
            answer = len(before)
            item: dict[str, Sequence[int] | int] = {
                "input_tokens": ids,
                "input_length": len(ids),
                "input_context": [int(position != answer + 1) for position in range(len(ids))],
                "input_span": [0] * len(ids),
                "index": [int(position == answer) for position in range(len(ids))],
            }
            encoded.append(item if example.label is None else {**item, "targets": example.label})
        return list(encoded)

    @cached_property
    def layout(self) -> Mapping[str, Layout]:
        """How each entry of an item is padded."""
        return {
            "input_tokens": Layout(token_id(self.tokenizer, "pad_id", "pad_token_id"), "max_length"),
            "input_length": Layout(),
            "input_context": Layout(1, "max_length", "bool"),
            "input_span": Layout(0, "max_length"),
            "targets": Layout(),
            "index": Layout(0, "max_length"),
        }


DATASET = Registry(CPM1Dataset, (LCQMC,))
