"""How each family reads a task: its data set, and which of its entries the model's forward takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_center import engine
from model_center.dataset.bertdataset import BertDataset
from model_center.dataset.cpm1dataset import DATASET as CPM1_TASKS
from model_center.dataset.cpm1dataset import CPM1Dataset
from model_center.dataset.cpm2dataset import DATASET as CPM2_TASKS
from model_center.dataset.cpm2dataset import CPM2Dataset
from model_center.dataset.gpt2dataset import DATASET as GPT2_TASKS
from model_center.dataset.gpt2dataset import GPT2Dataset
from model_center.dataset.gptjdataset import DATASET as GPTJ_TASKS
from model_center.dataset.gptjdataset import GPTjDataset
from model_center.dataset.t5dataset import DATASET as T5_TASKS
from model_center.dataset.t5dataset import T5Dataset
from model_center.dataset.tasks import TASKS, Task
from model_center.dataset.tasks.dataset import TaskDataset

DEFAULT_ANSWER_LENGTH = 32


@dataclass(frozen=True)
class TaskInput:
    """How a family reads a task.

    Attributes:
        dataset: Makes its items.
        tasks: Names of the known tasks that it has texts for.
        arguments: Argument of the model's forward -> entry of a batch. Encoders, which read several texts of a
            multiple-choice task, see to this themselves (see `classifier`).
        decoder_start: Tokens that a decoder reads before the slot's.
    """

    dataset: type[TaskDataset]
    tasks: Sequence[str]
    arguments: Mapping[str, str]
    decoder_start: int = 0


_DECODER = {"input_ids": "input_ids", "length": "input_length"}
_T5 = {
    "input_ids": "enc_input",
    "length": "enc_length",
    "decoder_input_ids": "dec_input",
    "decoder_length": "dec_length",
}
_CPM1 = {"input": "input_tokens", "length": "input_length", "context": "input_context", "span": "input_span"}
_CPM2 = {name: name for name in _T5.values()}
TASK_INPUTS: Mapping[str, TaskInput] = {
    "bert": TaskInput(BertDataset, [name for name, task in TASKS.items() if task.inputs], {}),
    "gpt2": TaskInput(GPT2Dataset, list(GPT2_TASKS), _DECODER),
    "gptj": TaskInput(GPTjDataset, list(GPTJ_TASKS), _DECODER),
    "t5": TaskInput(T5Dataset, list(T5_TASKS), _T5, decoder_start=1),
    "cpm1": TaskInput(CPM1Dataset, list(CPM1_TASKS), _CPM1),
    "cpm2": TaskInput(CPM2Dataset, list(CPM2_TASKS), _CPM2),
}
"""Model type -> how it reads tasks."""


def answer_length(task: Task, chosen: int | None) -> int | None:
    """Return the longest answer in tokens, None for a task with classes.

    Raises:
        ValueError: one was chosen for a task with classes.
    """
    if task.labels:
        if chosen is not None:
            raise ValueError(
                f"data.max_answer_length is for tasks that are answered in free text, but {task.name} has the classes "
                f"{', '.join(map(str, task.labels))}; leave it out"
            )
        return None
    return DEFAULT_ANSWER_LENGTH if chosen is None else chosen


def read_split(
    path: str | Path,
    split: str,
    task: Task,
    tokenizer: Any,
    max_length: int,
    *,
    family: str = "bert",
    max_answer_length: int | None = None,
) -> TaskDataset:
    """Read and tokenize one split of a task.

    Args:
        path: folder that holds the task's folder.
        split: "train", "dev" or "test".
        task: the task.
        tokenizer: the family's tokenizer.
        max_length: longest encoded sequence in tokens, of an encoder-decoder that of the encoder.
        family: model type.
        max_answer_length: longest answer of an encoder-decoder in tokens, of a task that is answered in free text.

    Raises:
        ValueError: the family has no texts for the task, the split is missing, or a row is broken (the message says
            file and line).
    """
    reading = TASK_INPUTS[family]
    if TASKS.get(task.name) is task and task.name not in reading.tasks:
        raise ValueError(
            f"data.task: {family} has no texts for {task.name}, only for {', '.join(reading.tasks)}; a YAML file may "
            "define others"
        )
    limits = [max_length]
    if max_answer_length is not None:
        limits.append(reading.decoder_start + max_answer_length)
    lengths: dict[str, Any] = dict(zip(reading.dataset.limits, limits, strict=False))
    return reading.dataset(path, split, engine.rank(), engine.world_size(), tokenizer, task=task, **lengths)
