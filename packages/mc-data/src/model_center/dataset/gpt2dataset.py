"""Task data sets for GPT-2 and other decoders.

An item holds ``input_ids``, ``input_length``, ``targets`` (the next token at each position, for language modelling),
``index`` (1 where the answer is predicted) and ``labels`` (the class). Compare the logits of the words in the data
set's `verbalizer` at the position that ``index`` marks.

Where the answer is free text (ReCoRD), it follows the prompt with an end-of-text token, ``index`` marks all of it, and
there are no ``labels``; without answers (``test``), the item ends with the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .tasks.catalogue import BOOLQ, CB, COPA, MULTIRC, RECORD, RTE, WIC, WSC
from .tasks.columns import Encoded, Layout
from .tasks.dataset import Registry
from .tasks.encoding import encode_texts, token_id
from .tasks.prompts import IGNORED, PromptDataset
from .tasks.reading import Example
from .tasks.template import Part

__all__ = ["DATASET", "GPT2Dataset"]


@dataclass(eq=False, repr=False)
class GPT2Dataset(PromptDataset):
    """A task as input for decoders: its prompt up to the slot (see `PromptDataset`).

    Args:
        max_decoder_length: Maximum number of tokens of an item.
        max_answer_length: How many of them are kept for an answer in free text in any split but ``train``, whatever the
            right one takes: a model that is evaluated must not learn from its prompt how long that one is.
    """

    max_decoder_length: int = 512
    max_answer_length: int = 32

    family = "gpt2"
    limits = ("max_decoder_length", "max_answer_length")

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Turn examples into model input."""
        answers: list[list[int]] = [[] for _ in examples]
        if self.task.answers and examples[0].answers:
            end = token_id(self.tokenizer, "eos_token_id", "eod_id")
            texts = encode_texts(self.tokenizer, [self.label_word(example.answers[0]) for example in examples])
            answers = [[*ids, end] for ids in texts]
        prompts = self.encode_prompts(examples, [self.max_decoder_length - kept for kept in self._kept(answers)])
        return [
            self._item(prompt, answer, example.label)
            for (prompt,), answer, example in zip(prompts, answers, examples, strict=True)
        ]

    def _kept(self, answers: Sequence[list[int]]) -> list[int]:
        """How many tokens behind each prompt are kept for its answer."""
        if not self.task.answers or self.split == "train":
            return [len(answer) for answer in answers]
        if self.max_answer_length >= self.max_decoder_length:
            raise ValueError(
                f"`max_decoder_length` must be above `max_answer_length` ({self.max_answer_length}), which is kept for "
                f"an answer, but is {self.max_decoder_length}; raise the one or lower the other"
            )
        return [self.max_answer_length] * len(answers)

    def _item(self, prompt: list[int], answer: list[int], label: int | None) -> Encoded:
        ids = (prompt + answer)[: self.max_decoder_length]
        predicted = max(len(ids) - len(prompt), 1)
        before = len(prompt) - 1
        item: dict[str, Sequence[int] | int] = {
            "input_ids": ids,
            "input_length": len(ids),
            "targets": [*ids[1:], IGNORED],
            "index": [0] * before + [1] * predicted + [0] * (len(ids) - before - predicted),
        }
        return item if label is None else {**item, "labels": label}

    def slot_parts(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """The text before the slot; the answer's word brings the space between them."""
        before = parts[0]
        return (Part(before.text.rstrip(), before.flexible),)

    def label_word(self, word: str) -> str:
        """A word within a text begins with its space."""
        return f" {word}"

    @cached_property
    def layout(self) -> Mapping[str, Layout]:
        """How each entry of an item is padded."""
        limit = "max_decoder_length"
        return {
            # Positions behind `input_length` are never attended to, and the published vocabulary has no padding token.
            "input_ids": Layout(0, limit),
            "input_length": Layout(),
            "targets": Layout(IGNORED, limit),
            "index": Layout(0, limit),
            "labels": Layout(),
        }


DATASET = Registry(GPT2Dataset, (BOOLQ, CB, COPA, RTE, WIC, WSC, MULTIRC, RECORD))
