"""What the families that read a task's prompt have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .dataset import TaskDataset
from .encoding import encode_parts
from .reading import Example
from .template import Part, Template

IGNORED = -100
"""The target of positions that no loss is computed at."""


@dataclass(eq=False, repr=False)
class PromptDataset(TaskDataset):
    """A task as a text with a slot for the answer (see `TaskDataset` for the arguments that all families share).

    A text that is longer than the limit loses the beginning of its flexible field, never the question or the slot.
    """

    def variants(self, examples: list[Example]) -> list[Example]:
        """In training, each example with its choices in both orders, if the task asks for it."""
        if self.split != "train" or self.task.swap_in_training is None:
            return examples
        first, second = self.task.swap_in_training
        both = []
        for example in examples:
            values = example.values | {first: example.values[second], second: example.values[first]}
            label = None if example.label is None else 1 - example.label
            both += [example, replace(example, values=values, label=label)]
        return both

    def slot_parts(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """What this family reads of the texts before and behind the slot."""
        return parts

    def encode_prompts(self, examples: Sequence[Example], room: Sequence[int]) -> list[list[list[int]]]:
        """The ids before and behind the slot of each example.

        Args:
            examples: The examples.
            room: How many tokens the prompt of each may have.
        """
        template = Template(self.task.prompt_for(self.family).template)
        rows = [self.slot_parts(template.render(example.values, self.task.flexible)) for example in examples]
        places = [example.where for example in examples]
        return encode_parts(self.tokenizer, rows, room, "left", places)
