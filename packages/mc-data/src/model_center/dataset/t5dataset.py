"""Task data sets for T5.

An item holds ``enc_input`` (the prompt with the sentinel ``<extra_id_0>`` in its slot), ``enc_length``, ``dec_input``
(the padding token that starts a decoder, and the sentinel), ``dec_length``, ``targets`` (the class) and ``index`` (1
where the answer is predicted). Compare the logits of the words in the data set's `verbalizer` at that position.

Where the answer is free text (ReCoRD, SQuAD), ``dec_input`` goes on with it, ``targets`` holds the token that follows
at each position that ``index`` marks (and -100 elsewhere), and the last one is the end of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .tasks.catalogue import BOOLQ, CB, COPA, MULTIRC, RECORD, RTE, SQUAD, WIC, WSC
from .tasks.columns import Encoded, Layout
from .tasks.dataset import Registry
from .tasks.encoding import encode_texts, token_id, vocabulary_id
from .tasks.prompts import IGNORED, PromptDataset
from .tasks.reading import Example

__all__ = ["DATASET", "T5Dataset"]

SENTINEL = "<extra_id_0>"


@dataclass(eq=False, repr=False)
class T5Dataset(PromptDataset):
    """A task as input for T5 (see `PromptDataset`).

    Args:
        max_encoder_length: Maximum number of tokens of the encoder's input.
        max_decoder_length: Maximum number of tokens of the decoder's input; a longer answer loses its end.
    """

    max_encoder_length: int = 512
    max_decoder_length: int = 32

    family = "t5"
    limits = ("max_encoder_length", "max_decoder_length")
    label_entry = "targets"

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Turn examples into model input."""
        if self.max_decoder_length < 2:
            raise ValueError(f"`max_decoder_length` must be at least 2, but is {self.max_decoder_length}")
        end = token_id(self.tokenizer, "eos_token_id", "eod_id")
        slot = vocabulary_id(self.tokenizer, SENTINEL)
        start = [token_id(self.tokenizer, "pad_token_id", "pad_id"), slot]
        prompts = self.encode_prompts(examples, [self.max_encoder_length - 2] * len(examples))
        answers: list[list[int]] = [[] for _ in examples]
        if self.task.answers and examples[0].answers:
            answers = encode_texts(self.tokenizer, [example.answers[0] for example in examples])
        encoded = []
        for (before, behind), answer, example in zip(prompts, answers, examples, strict=True):
            enc_input = [*before, slot, *behind, end]
            dec_input = [*start, *answer][: self.max_decoder_length]
            item: dict[str, Sequence[int] | int] = {
                "enc_input": enc_input,
                "enc_length": len(enc_input),
                "dec_input": dec_input,
                "dec_length": len(dec_input),
                "index": [0, *[1] * (len(dec_input) - 1)],
            }
            if answer:
                item["targets"] = [IGNORED, *answer, end][: len(dec_input)]
            elif example.label is not None:
                item["targets"] = example.label
            encoded.append(item)
        return list(encoded)

    @cached_property
    def layout(self) -> Mapping[str, Layout]:
        """How each entry of an item is padded."""
        fill = token_id(self.tokenizer, "pad_token_id", "pad_id")
        return {
            "enc_input": Layout(fill, "max_encoder_length"),
            "enc_length": Layout(),
            "dec_input": Layout(fill, "max_decoder_length"),
            "dec_length": Layout(),
            "targets": Layout(IGNORED, "max_decoder_length") if self.task.answers else Layout(),
            "index": Layout(0, "max_decoder_length"),
        }


DATASET = Registry(T5Dataset, (BOOLQ, CB, COPA, RTE, WIC, WSC, MULTIRC, RECORD, SQUAD))
