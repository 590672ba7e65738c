"""Decoders and encoder-decoders that answer a prompt: with the likeliest of a few words, or in free text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_center.dataset.tasks.dataset import TaskDataset
from model_center.model import BaseModel, DecoderLM, Seq2Seq
from model_center.tokenizer import load_tokenizer

from .configuration import require
from .decoding import Continuation, DecoderContinuation, Seq2SeqContinuation, decode_greedily
from .task_input import TASK_INPUTS
from .task_model import Batch, ClassModel, Loss, TaskHead, TaskModel, load_backbone, read_head, to_engine

HEAD_FILE = "prompt.json"
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class PromptHead(TaskHead):
    """How a model answers prompts; kept in a checkpoint's `prompt.json`."""

    words: list[int] = field(default_factory=list)
    """Token id of each class's word; none where answers are free text."""
    max_answer_length: int | None = None
    """Longest answer in tokens, its end included; None where there are classes."""

    def __post_init__(self) -> None:
        require(bool(self.words) != bool(self.max_answer_length), "words", "given, or max_answer_length", self.words)


def prompt_model(model: BaseModel, tokenizer: Any, head: PromptHead) -> TaskModel:
    """Let a model answer prompts.

    Args:
        model: a decoder or an encoder-decoder.
        tokenizer: its tokenizer.
        head: how it answers.

    Raises:
        ValueError: the model has a classification head in place of the one that scores words.
    """
    if model.config.cls_head is not None:
        raise ValueError(
            f"model.name must be a model that scores words, but this {type(model).__name__} has a head for "
            f"{model.config.cls_head} classes (`cls_head`)"
        )
    return WordChooser(model, head) if head.words else TextWriter(model, head, tokenizer)


def load_prompt_model(directory: Path | str, dtype: torch.dtype | None = None) -> tuple[TaskModel, Any]:
    """Load what a run of a decoder or an encoder-decoder has saved; as `load_task_model` loads that of any family."""
    directory = Path(directory)
    head = read_head(directory / HEAD_FILE, PromptHead, "model that answers prompts")
    tokenizer = load_tokenizer(directory)
    model = prompt_model(load_backbone(directory, dtype=dtype), tokenizer, head)
    model.eval()
    return model, tokenizer


class _Prompted(TaskModel):
    """What both ways to answer share."""

    head_file = HEAD_FILE

    def __init__(self, model: BaseModel, head: PromptHead) -> None:
        super().__init__(head)
        self.model = model
        self.head: PromptHead
        self._input = TASK_INPUTS[model.config.model_type]

    @property
    def backbone(self) -> BaseModel:
        """The pre-trained model."""
        return self.model

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the decoder's hidden states (rows, length, dim_model)."""
        inputs = to_engine({argument: batch[entry] for argument, entry in self._input.arguments.items()})
        states: Tensor = self.model(**inputs, return_logits=False).last_hidden_state
        return states


class WordChooser(_Prompted, ClassModel):
    """Chooses among the words of a task's classes, at the one position that the batch's `index` marks.

    Args:
        model: a decoder or an encoder-decoder.
        head: how it answers.
    """

    def __init__(self, model: BaseModel, head: PromptHead) -> None:
        super().__init__(model, head)
        self.label_entry = self._input.dataset.label_entry

    @property
    def answers_in(self) -> str:
        """The number of classes."""
        return f"{len(self.head.words)} classes"

    def forward(self, batch: Batch) -> Tensor:
        """Return the words' logits (rows, classes)."""
        states = self.hidden_states(batch)[batch["index"] == 1]
        return self.model.logits(states)[:, self.head.words]


class TextWriter(_Prompted):
    """Writes the answer: learns it token by token, and decodes greedily.

    Args:
        model: GPT-2, GPT-J or an encoder-decoder.
        head: how it answers.
        tokenizer: turns ids into text.
    """

    def __init__(self, model: BaseModel, head: PromptHead, tokenizer: Any) -> None:
        super().__init__(model, head)
        self.tokenizer = tokenizer

    @property
    def answers_in(self) -> str:
        """The length of the longest answer."""
        return f"answers of at most {self.head.max_answer_length} tokens"

    def loss(self, batch: Batch) -> Loss:
        """Return the cross entropy of all tokens of the answers, each after the right ones before it.

        Of a batch on the CPU the targets stay there, so that the host need not wait for a GPU to find them.
        """
        targets = batch["targets"].masked_fill(batch["index"] == 0, IGNORED)
        summed = self.model.summed_loss(self.hidden_states(batch), targets)
        return Loss(summed, int((targets != IGNORED).sum()))

    def answer(self, batch: Batch) -> tuple[Loss, list[str]]:
        """Return the loss, and the text that the model writes by itself for each row."""
        continuation, limits = self._continuation(to_engine(batch))
        rows = decode_greedily(self.model, continuation, limits, self.tokenizer.eod_id)
        return self.loss(batch), [self.tokenizer.decode(ids).strip() for ids in rows]

    def _continuation(self, batch: Batch) -> tuple[Continuation, Tensor]:
        """Return what is gone on with, the prompts without their answers, and how far."""
        room = self.head.max_answer_length
        assert room is not None
        # The first answer token is predicted at the first position that is marked.
        before = batch["index"].argmax(dim=1) + 1
        if isinstance(self.model, Seq2Seq):
            start = batch["dec_input"][:, : int(before[0])]
            source, length = batch["enc_input"], batch["enc_length"]
            return Seq2SeqContinuation(self.model, source, length, start, room), torch.full_like(before, room)
        assert isinstance(self.model, DecoderLM)
        longest = self.head.max_length
        limits = (longest - before).clamp(1, room)
        return DecoderContinuation(self.model, batch["input_ids"], before, room, longest - 1), limits


def label_words(dataset: TaskDataset) -> list[int]:
    """Return the token of each class's word; none where answers are free text.

    Raises:
        ValueError: a word is not a token of its own.
    """
    return [] if dataset.task.answers else dataset.verbalizer.tolist()
