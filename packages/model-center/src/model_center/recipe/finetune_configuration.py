"""What `model-center finetune` and `quickstart` can be told."""

from dataclasses import dataclass, field, replace
from typing import Literal

from .configuration import (
    EngineOptions,
    OptimizerOptions,
    OutputOptions,
    PrecisionOptions,
    absolute,
    absolute_if_local,
    require,
    require_choice,
    require_outside,
    to_yaml,
)

Pooling = Literal["mean", "cls", "pooler"]


@dataclass(kw_only=True)
class ModelOptions(PrecisionOptions):
    """The model that is fine-tuned, of any family, and the classification head on top of an encoder."""

    name: str
    """Directory of a checkpoint (written by save_pretrained, by Transformers or by an earlier ModelCenter), or a
    documented identifier such as bert-base-uncased."""
    family: str | None = None
    """Family of a checkpoint that does not say it itself, as those of earlier ModelCenters: bert, gpt2, gptj, t5, cpm1
    or cpm2."""
    tokenizer: str | None = None
    """Directory or identifier of the tokenizer; the model's own when not given."""
    pooling: Pooling | None = None
    """What an encoder's classifier reads: mean over the real tokens (when not given), cls (the first token), or pooler
    (the model's own pooler output). Other families have no classifier: they answer in words."""
    dropout: float | None = None
    """Share of the pooled vector's elements that are zeroed before an encoder's classifier in training; 0.1 when not
    given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.name), "model.name", "a directory or an identifier", self.name)
        if self.pooling is not None:
            require_choice("model.pooling", self.pooling, Pooling)
        dropout = self.dropout
        require(dropout is None or 0 <= dropout < 1, "model.dropout", "at least 0 and below 1", dropout)


@dataclass(kw_only=True)
class DataOptions:
    """The task in the format of SuperGLUE, SQuAD or LCQMC, and how it is cut into batches."""

    path: str
    """Folder that holds one folder a task, e.g. BoolQ/train.jsonl and BoolQ/val.jsonl."""
    task: str = "BoolQ"
    """Name of a known task, e.g. BoolQ, CB or SQuAD, or a YAML file that defines one."""
    max_length: int = 512
    """Longest encoded sequence in tokens, of T5 and CPM-2 that of the encoder; longer ones are cut. At most the model's
    position_size."""
    max_answer_length: int | None = None
    """Longest answer in tokens, its end included, of tasks that are answered in free text; 32 when not given. The model
    writes no longer ones, and T5 and CPM-2 learn no more of them."""
    batch_size: int = 16
    """Sequences in a training step, in each process."""
    eval_batch_size: int = 64
    """Sequences in an evaluation step, in each process."""
    bucket_by_length: bool = True
    """Train on batches of samples of similar length, which saves padding; otherwise on batches of any samples."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", "a folder", self.path)
        for name in ("max_length", "max_answer_length", "batch_size", "eval_batch_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name}", "positive", value)


@dataclass(kw_only=True)
class RunOptions(OutputOptions):
    """Where a run is written and how long it goes on."""

    epochs: int = 3
    """Passes over the training split; each ends with an evaluation."""
    max_steps: int | None = None
    """Stop after this many steps (with an evaluation), even within an epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs > 0, "epochs", "positive", self.epochs)
        require(self.max_steps is None or self.max_steps > 0, "max_steps", "positive", self.max_steps)


@dataclass(kw_only=True)
class FinetuneConfig(RunOptions):
    """Fine-tune a model of any family on a task in the format of SuperGLUE, SQuAD or LCQMC."""

    model: ModelOptions
    """The model that is fine-tuned, of any family, and the classification head on top of an encoder."""
    data: DataOptions
    """The task in the format of SuperGLUE, SQuAD or LCQMC, and how it is cut into batches."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """AdamW, its learning-rate schedule and gradient clipping."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """What runs the model, and how it trades memory for time."""

    def resolved(self) -> "FinetuneConfig":
        """Return a copy that means the same from any working directory: local paths are absolute.

        Raises:
            ValueError: something that the run reads lies in its output directory.
        """
        tokenizer = self.model.tokenizer
        model = replace(
            self.model,
            name=absolute_if_local(self.model.name),
            tokenizer=None if tokenizer is None else absolute_if_local(tokenizer),
        )
        is_file = self.data.task.endswith((".yaml", ".yml"))
        task = absolute(self.data.task) if is_file else self.data.task
        data = replace(self.data, path=absolute(self.data.path), task=task)
        output = absolute(self.output)
        inputs = {"model.name": model.name, "data.path": data.path, "data.task": data.task}
        if model.tokenizer is not None:
            inputs["model.tokenizer"] = model.tokenizer
        require_outside(output, inputs.items())
        return replace(self, output=output, model=model, data=data)

    def to_yaml(self) -> str:
        """Return the configuration as YAML, which `model-center finetune --config` reads."""
        return to_yaml(self)


@dataclass(kw_only=True)
class QuickstartConfig(RunOptions):
    """Fine-tune the MiniLM encoder on a small sample of BoolQ: a complete run in minutes on two CPU cores."""

    output: str = "runs/quickstart"
    """Run directory; it must not exist yet, or be empty."""
    epochs: int = 2
    """Passes over the training split; each ends with an evaluation."""
