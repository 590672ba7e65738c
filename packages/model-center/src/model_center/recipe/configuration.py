"""What a fine-tuning run can be told: documented dataclasses that are also the command's options and its YAML file."""

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Precision = Literal["half", "bf16", "fp32"]
Pooling = Literal["mean", "cls", "pooler"]
Schedule = Literal["linear", "cosine", "noam", "constant"]
AnomalyPolicy = Literal["warn", "skip", "rewind", "stop"]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known word most like `word`, or nothing when none is like it."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def require(holds: bool, option: str, rule: str, value: object) -> None:
    """Raise ValueError naming the option, the rule it breaks and the value found, unless the rule holds."""
    if not holds:
        raise ValueError(f"{option} must be {rule}, but is {value!r}")


def require_choice(option: str, value: object, choices: Any) -> None:
    """Raise ValueError unless the value is one of those that the Literal type `choices` lists."""
    require(value in get_args(choices), option, f"one of {', '.join(get_args(choices))}", value)


@dataclass(kw_only=True)
class ModelOptions:
    """The encoder that is fine-tuned, and the classification head on top of it."""

    name: str
    """Directory of a checkpoint (written by save_pretrained, by Transformers or by an earlier ModelCenter), or a
    documented identifier such as bert-base-uncased."""
    family: str | None = None
    """Family of a checkpoint that does not say it itself, as those of earlier ModelCenters, e.g. bert."""
    tokenizer: str | None = None
    """Directory or identifier of the tokenizer; the model's own when not given."""
    precision: Precision = "half"
    """Type of weights and activations: half is fp16 on CUDA and fp32 on the CPU, bf16 is the one to take on current
    GPUs; the optimizer keeps fp32 master weights in either case."""
    pooling: Pooling = "mean"
    """What the classifier reads: mean over the real tokens, cls (the first token), or pooler (the model's own pooler
    output)."""
    dropout: float = 0.1
    """Share of the pooled vector's elements that are zeroed before the classifier in training."""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name", "a directory or an identifier", self.name)
        require_choice("model.precision", self.precision, Precision)
        require_choice("model.pooling", self.pooling, Pooling)
        require(0 <= self.dropout < 1, "model.dropout", "at least 0 and below 1", self.dropout)


@dataclass(kw_only=True)
class DataOptions:
    """The task in SuperGLUE's format, and how it is cut into batches."""

    path: str
    """Folder that holds one folder a task, e.g. BoolQ/train.jsonl and BoolQ/val.jsonl."""
    task: str = "BoolQ"
    """Name of a known task, e.g. BoolQ, CB or RTE, or a YAML file that defines one."""
    max_length: int = 512
    """Longest encoded sequence in tokens; longer ones are cut. At most the model's position_size."""
    batch_size: int = 16
    """Sequences in a training step, in each process."""
    eval_batch_size: int = 64
    """Sequences in an evaluation step, in each process."""
    bucket_by_length: bool = True
    """Train on batches of samples of similar length, which saves padding; otherwise on batches of any samples."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", "a folder", self.path)
        for name in ("max_length", "batch_size", "eval_batch_size"):
            require(getattr(self, name) > 0, f"data.{name}", "positive", getattr(self, name))


@dataclass(kw_only=True)
class OptimizerOptions:
    """AdamW, its learning-rate schedule and gradient clipping."""

    learning_rate: float = 5e-5
    """Highest learning rate of the schedule."""
    schedule: Schedule = "linear"
    """How the learning rate goes on after its warm-up: linear or cosine to zero at the last step, noam (inverse square
    root of the step) or constant."""
    warmup_ratio: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm over all parameters."""
    offload: bool = False
    """Keep optimizer states and the update on the CPU, for models that do not fit on the GPU otherwise."""

    def __post_init__(self) -> None:
        require_choice("optimizer.schedule", self.schedule, Schedule)
        require(self.learning_rate > 0, "optimizer.learning_rate", "positive", self.learning_rate)
        require(0 <= self.warmup_ratio <= 1, "optimizer.warmup_ratio", "between 0 and 1", self.warmup_ratio)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "zero or positive", self.weight_decay)
        require(0 <= self.beta1 < 1, "optimizer.beta1", "at least 0 and below 1", self.beta1)
        require(0 <= self.beta2 < 1, "optimizer.beta2", "at least 0 and below 1", self.beta2)
        require(self.max_gradient_norm > 0, "optimizer.max_gradient_norm", "positive", self.max_gradient_norm)


@dataclass(kw_only=True)
class WatchOptions:
    """What is an anomaly of the loss, and what is done about it."""

    non_finite: AnomalyPolicy = "skip"
    """What to do when the loss or the gradient norm is NaN or infinite: warn and go on, skip the update, rewind to the
    last checkpoint and leave the batch out, or stop."""
    spike: AnomalyPolicy = "warn"
    """What to do when the loss is far above the recent ones."""
    window: int = 128
    """Recent losses that a spike is measured against; there are no spikes before that many steps."""
    factor: float = 10.0
    """A spike is above their median by this many of their standard deviations, as estimated from the median absolute
    deviation."""
    patience: int = 10
    """Skipped steps in a row after which the run stops."""
    max_rewinds: int = 3
    """Rewinds of a run after which it stops instead of rewinding again."""

    def __post_init__(self) -> None:
        require_choice("watch.non_finite", self.non_finite, AnomalyPolicy)
        require_choice("watch.spike", self.spike, AnomalyPolicy)
        require(self.window > 1, "watch.window", "above 1", self.window)
        require(self.factor > 0, "watch.factor", "positive", self.factor)
        require(self.patience > 0, "watch.patience", "positive", self.patience)
        require(self.max_rewinds > 0, "watch.max_rewinds", "positive", self.max_rewinds)


@dataclass(kw_only=True)
class RunOptions:
    """Where a run is written and how long it goes on."""

    output: str
    """Run directory; it must not exist yet, or be empty."""
    seed: int = 0
    """Seed of the classifier's weights, of dropout and of the order of the samples."""
    epochs: int = 3
    """Passes over the training split; each ends with an evaluation."""
    max_steps: int | None = None
    """Stop after this many steps (with an evaluation), even within an epoch."""
    log_every: int = 10
    """Print a line every so many steps where the output is not a terminal."""

    def __post_init__(self) -> None:
        require(bool(self.output), "output", "a directory", self.output)
        require(self.seed >= 0, "seed", "zero or positive", self.seed)
        require(self.epochs > 0, "epochs", "positive", self.epochs)
        require(self.max_steps is None or self.max_steps > 0, "max_steps", "positive", self.max_steps)
        require(self.log_every > 0, "log_every", "positive", self.log_every)


@dataclass(kw_only=True)
class FinetuneConfig(RunOptions):
    """Fine-tune an encoder on a classification task in SuperGLUE's format."""

    model: ModelOptions
    """The encoder that is fine-tuned, and the classification head on top of it."""
    data: DataOptions
    """The task in SuperGLUE's format, and how it is cut into batches."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """AdamW, its learning-rate schedule and gradient clipping."""

    def resolved(self) -> "FinetuneConfig":
        """Return a copy that means the same from any working directory: local paths are absolute."""
        tokenizer = self.model.tokenizer
        model = replace(
            self.model,
            name=_absolute_if_local(self.model.name),
            tokenizer=None if tokenizer is None else _absolute_if_local(tokenizer),
        )
        is_file = self.data.task.endswith((".yaml", ".yml"))
        task = _absolute(self.data.task) if is_file else self.data.task
        data = replace(self.data, path=_absolute(self.data.path), task=task)
        return replace(self, output=_absolute(self.output), model=model, data=data)

    def to_yaml(self) -> str:
        """Return the configuration as YAML, which `model-center finetune --config` reads."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


@dataclass(kw_only=True)
class QuickstartConfig(RunOptions):
    """Fine-tune the MiniLM encoder on a small sample of BoolQ: a complete run in minutes on two CPU cores."""

    output: str = "runs/quickstart"
    """Run directory; it must not exist yet, or be empty."""
    epochs: int = 2
    """Passes over the training split; each ends with an evaluation."""


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _absolute_if_local(name: str) -> str:
    return _absolute(name) if Path(name).expanduser().exists() else name
