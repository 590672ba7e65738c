"""Task data sets for CPM-2.

An item holds ``enc_input`` (the prompt with the sentinel ``<s_0>`` in its slot), ``enc_length``, ``dec_input`` (the
sentinel), ``dec_length``, ``targets`` (the class) and ``index`` (1 where the answer is predicted). Compare the logits
of the words in the data set's `verbalizer` at that position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .tasks.catalogue import LCQMC
from .tasks.columns import Encoded, Layout
from .tasks.dataset import Registry
from .tasks.encoding import vocabulary_id
from .tasks.prompts import PromptDataset
from .tasks.reading import Example

__all__ = ["DATASET", "CPM2Dataset"]

SENTINEL = "<s_0>"


@dataclass(eq=False, repr=False)
class CPM2Dataset(PromptDataset):
    """A task as input for CPM-2 (see `PromptDataset`).

    Args:
        max_encoder_length: Maximum number of tokens of the encoder's input.
        max_decoder_length: Number of tokens that the decoder's input is padded to with ``padding="max_length"``.
    """

    max_encoder_length: int = 512
    max_decoder_length: int = 8

    family = "cpm2"
    limits = ("max_encoder_length", "max_decoder_length")
    label_entry = "targets"

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Turn examples into model input."""
        self.require_classes()
        slot = vocabulary_id(self.tokenizer, SENTINEL)
        encoded = []
        for (before, behind), example in zip(
            self.encode_prompts(examples, [self.max_encoder_length - 1] * len(examples)), examples, strict=True
        ):
            enc_input = [*before, slot, *behind]
            item: dict[str, Sequence[int] | int] = {
                "enc_input": enc_input,
                "enc_length": len(enc_input),
                "dec_input": [slot],
                "dec_length": 1,
                "index": [1],
            }
            encoded.append(item if example.label is None else {**item, "targets": example.label})
        return list(encoded)

    @cached_property
    def layout(self) -> Mapping[str, Layout]:
        """How each entry of an item is padded."""
        # Positions behind the lengths are never attended to.
        return {
            "enc_input": Layout(0, "max_encoder_length"),
            "enc_length": Layout(),
            "dec_input": Layout(0, "max_decoder_length"),
            "dec_length": Layout(),
            "targets": Layout(),
            "index": Layout(0, "max_decoder_length"),
        }


DATASET = Registry(CPM2Dataset, (LCQMC,))
