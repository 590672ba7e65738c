"""What T5 and CPM-2 have in common: an encoder that reads the prompt, and a decoder that fills its slot."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from .columns import Encoded, Layout
from .encoding import encode_texts, token_id, vocabulary_id
from .prompts import IGNORED, PromptDataset
from .reading import Example


@dataclass(eq=False, repr=False)
class Seq2SeqDataset(PromptDataset):
    """A task as input for an encoder and a decoder (see `PromptDataset`).

    Args:
        max_encoder_length: Maximum number of tokens of the encoder's input.
        max_decoder_length: Maximum number of tokens of the decoder's input; a longer answer loses its end.
    """

    max_encoder_length: int = 512
    max_decoder_length: int = 32

    limits = ("max_encoder_length", "max_decoder_length")
    label_entry = "targets"
    sentinel: ClassVar[str]
    """The token in the slot, which the decoder reads before it answers."""

    @property
    @abstractmethod
    def fill(self) -> int:
        """Id that pads both inputs."""

    def encoder_end(self) -> list[int]:
        """What ends the encoder's input."""
        return []

    def decoder_start(self) -> list[int]:
        """What the decoder reads before the sentinel."""
        return []

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Turn examples into model input."""
        end, start = self.encoder_end(), self.decoder_start()
        if self.max_decoder_length <= len(start):
            raise ValueError(
                f"`max_decoder_length` must be at least {len(start) + 1}, but is {self.max_decoder_length}"
            )
        slot = vocabulary_id(self.tokenizer, self.sentinel)
        room = self.max_encoder_length - 1 - len(end)
        prompts = self.encode_prompts(examples, [room] * len(examples))
        answers: Sequence[list[int] | None] = [None] * len(examples)
        if self.task.answers and examples[0].answers:
            answers = encode_texts(self.tokenizer, [example.answers[0] for example in examples])
        encoded = []
        for (before, behind), answer, example in zip(prompts, answers, examples, strict=True):
            enc_input = [*before, slot, *behind, *end]
            dec_input = [*start, slot, *(answer or ())][: self.max_decoder_length]
            item: dict[str, Sequence[int] | int] = {
                "enc_input": enc_input,
                "enc_length": len(enc_input),
                "dec_input": dec_input,
                "dec_length": len(dec_input),
                "index": [int(position >= len(start)) for position in range(len(dec_input))],
            }
            if answer is not None:
                answer_end = token_id(self.tokenizer, "eos_token_id", "eod_id")
                item["targets"] = [*[IGNORED] * len(start), *answer, answer_end][: len(dec_input)]
            elif example.label is not None:
                item["targets"] = example.label
            encoded.append(item)
        return list(encoded)

    @cached_property
    def layout(self) -> Mapping[str, Layout]:
        """How each entry of an item is padded."""
        return {
            "enc_input": Layout(self.fill, "max_encoder_length"),
            "enc_length": Layout(),
            "dec_input": Layout(self.fill, "max_decoder_length"),
            "dec_length": Layout(),
            "targets": Layout(IGNORED, "max_decoder_length") if self.task.answers else Layout(),
            "index": Layout(0, "max_decoder_length"),
        }
