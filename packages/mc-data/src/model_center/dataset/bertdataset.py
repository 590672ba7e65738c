"""Task data sets for BERT and other encoders.

An item holds ``input_ids``, ``attention_mask`` (1 for real tokens), ``token_type_ids`` (if the tokenizer gives them)
and ``labels``. A multiple-choice task (COPA) has the first three once for each choice: ``input_ids0``, ``input_ids1``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .tasks.catalogue import BOOLQ, CB, COPA, MULTIRC, RTE, WIC, WSC
from .tasks.columns import Encoded, Layout
from .tasks.dataset import Registry, TaskDataset
from .tasks.encoding import encode_parts, special_tokens, token_id
from .tasks.reading import Example
from .tasks.template import Template

__all__ = ["DATASET", "BertDataset"]


@dataclass(eq=False, repr=False)
class BertDataset(TaskDataset):
    """A task as input for encoders (see `TaskDataset` for the arguments they all share).

    A text that is longer than the limit loses the end of its flexible field (BoolQ: the passage), never the question.

    Args:
        max_encoder_length: Maximum number of tokens of an input, special tokens included.
    """

    max_encoder_length: int = 512

    family = "bert"
    limits = ("max_encoder_length",)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Turn examples into model input."""
        self.require_classes()
        if not self.task.inputs:
            raise ValueError(f"task {self.task.name!r} has no `inputs` for encoders")
        encoded: list[dict[str, Sequence[int] | int]] = [{} for _ in examples]
        places = [example.where for example in examples]
        for choice, segments in enumerate(self.task.inputs):
            suffix = str(choice) if len(self.task.inputs) > 1 else ""
            special = special_tokens(self.tokenizer, len(segments))
            templates = [Template(text) for text in segments]
            rows = [
                tuple(template.render(example.values, self.task.flexible)[0] for template in templates)
                for example in examples
            ]
            room = [self.max_encoder_length - special.count] * len(rows)
            parts = encode_parts(self.tokenizer, rows, room, "right", places)
            for entry, segment_ids in zip(encoded, parts, strict=True):
                ids, types = special.wrap(segment_ids)
                entry[f"input_ids{suffix}"] = ids
                entry[f"attention_mask{suffix}"] = [1] * len(ids)
                if types is not None:
                    entry[f"token_type_ids{suffix}"] = types
        for entry, example in zip(encoded, examples, strict=True):
            if example.label is not None:
                entry["labels"] = example.label
        return list(encoded)

    @cached_property
    def layout(self) -> Mapping[str, Layout]:
        """How each entry of an item is padded."""
        fills = {
            "input_ids": token_id(self.tokenizer, "pad_token_id", "pad_id"),
            "attention_mask": 0,
            "token_type_ids": 0,
        }
        choices = len(self.task.inputs)
        suffixes = [str(choice) for choice in range(choices)] if choices > 1 else [""]
        sequences = {
            f"{name}{suffix}": Layout(fill, "max_encoder_length") for name, fill in fills.items() for suffix in suffixes
        }
        return {**sequences, "labels": Layout()}


DATASET = Registry(BertDataset, (BOOLQ, CB, COPA, RTE, WIC, WSC, MULTIRC))
