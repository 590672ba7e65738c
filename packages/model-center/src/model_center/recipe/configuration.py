"""What a run can be told: documented dataclasses that are also the command's options and its YAML file."""

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Precision = Literal["half", "bf16", "fp32"]
Pooling = Literal["mean", "cls", "pooler"]
Schedule = Literal["linear", "cosine", "noam", "constant"]
EngineName = Literal["torch", "bmtrain"]
Objective = Literal["causal", "prefix", "context", "masked", "spans"]
SAMPLE = "sample:"
"""What the name of a text that comes with this package begins with."""
HIGHEST_LEARNING_RATE = 1.0
"""No schedule of AdamW trains with a larger one."""
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
    warmup_steps: int | None = None
    """The same as a number of steps; takes the place of warmup_ratio."""
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
        rate, steps = self.learning_rate, self.warmup_steps
        require(0 < rate <= HIGHEST_LEARNING_RATE, "optimizer.learning_rate", "positive and at most 1", rate)
        require(steps is None or steps >= 0, "optimizer.warmup_steps", "zero or positive", steps)
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
        return to_yaml(self)


@dataclass(kw_only=True)
class QuickstartConfig(RunOptions):
    """Fine-tune the MiniLM encoder on a small sample of BoolQ: a complete run in minutes on two CPU cores."""

    output: str = "runs/quickstart"
    """Run directory; it must not exist yet, or be empty."""
    epochs: int = 2
    """Passes over the training split; each ends with an evaluation."""


@dataclass(kw_only=True)
class PretrainModelOptions:
    """The model that is pre-trained, of any family."""

    name: str
    """A published size such as gpt2-base, bert-base-uncased or t5-small for a fresh model of that size, or the
    directory of a checkpoint or of a configuration (config.json)."""
    from_scratch: bool | None = None
    """true begins with random weights, false with those of the directory; when not given, weights are used where there
    are some."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the model's configuration that differ from those of name, e.g. --model.options.num_layers 4."""
    precision: Precision = "half"
    """Type of weights and activations: half is fp16 on CUDA and fp32 on the CPU, bf16 is the one to take on current
    GPUs; the optimizer keeps fp32 master weights in either case."""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name", "a directory or the name of a published size", self.name)
        require_choice("model.precision", self.precision, Precision)


@dataclass(kw_only=True)
class PretrainDataOptions:
    """Indexed data sets of token ids (or raw text to make them of), and how they become samples."""

    path: str
    """Folder of the data sets, as mc-preprocess writes them."""
    name: str = "train"
    """Common start of the names of the training files: name_1.bin, name_1.idx, name_2.bin, and so on."""
    text: str | None = None
    """Raw text, tokenized into path first unless that has been done before: a file, a glob pattern of files, or
    sample:shakespeare for what comes with this package."""
    tokenizer: str
    """Directory or identifier of the tokenizer that the ids are of, or train:SIZE to train one of at most so many
    entries on the raw text."""
    objective: Objective | None = None
    """What the model learns to do: causal (GPT-2), prefix, context (CPM-1), masked (BERT) or spans (T5); by default
    that of the model's family."""
    max_length: int = 512
    """Longest sequence in tokens. Raw text is cut into pieces of that length when it is tokenized; of a longer sequence
    in data sets that exist already, the rest is never trained on."""
    pack: bool = True
    """Put several short samples into one row, which see nothing of each other; otherwise each row is padded."""
    validation_name: str | None = None
    """Common start of the names of the validation files; when not given, validation_share of the samples is held
    out."""
    validation_share: float = 0.01
    """Share of the training samples that is held out for validation where there are no files for it."""

    def __post_init__(self) -> None:
        for name in ("path", "name", "tokenizer"):
            require(bool(getattr(self, name)), f"data.{name}", "given", getattr(self, name))
        if self.objective is not None:
            require_choice("data.objective", self.objective, Objective)
        require(self.max_length > 1, "data.max_length", "at least 2", self.max_length)
        share = self.validation_share
        require(0 < share < 1, "data.validation_share", "above 0 and below 1", share)
        if self.validation_name == self.name:
            raise ValueError(f"data.validation_name must differ from data.name, but both are {self.name!r}")


@dataclass(kw_only=True)
class BatchOptions:
    """How many samples make a training step, and how many of them are computed at once."""

    global_size: int = 32
    """Samples in a training step, over all processes: the same whatever their number."""
    micro_size: int = 8
    """Rows that one process computes at once; gradients add up until the step has its samples. Changes speed and
    memory, not the result."""

    def __post_init__(self) -> None:
        require(self.global_size > 0, "batch.global_size", "positive", self.global_size)
        require(self.micro_size > 0, "batch.micro_size", "positive", self.micro_size)


@dataclass(kw_only=True)
class CheckpointOptions:
    """When a run saves all it needs to go on, and what of it is kept."""

    every_steps: int | None = 1000
    """Save after so many steps; null for never."""
    every_minutes: float | None = 15.0
    """Save after so many minutes; null for never. The last step is saved in any case."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept."""
    keep_best: bool = True
    """Keep the one with the lowest validation loss as well."""
    asynchronous: bool = True
    """Write while training goes on; needs host memory for a copy of what is written."""

    def __post_init__(self) -> None:
        steps, minutes = self.every_steps, self.every_minutes
        require(steps is None or steps > 0, "checkpoints.every_steps", "positive or null", steps)
        require(minutes is None or minutes > 0, "checkpoints.every_minutes", "positive or null", minutes)
        require(self.keep_last > 0, "checkpoints.keep_last", "positive", self.keep_last)


@dataclass(kw_only=True)
class ValidationOptions:
    """When a pre-training run measures its loss on samples that it does not train on."""

    every_steps: int = 500
    """Validate after so many steps; the last step is followed by a validation in any case."""
    batches: int | None = None
    """Stop after so many micro-batches of each process; null for all samples that are held out."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "validation.every_steps", "positive", self.every_steps)
        require(self.batches is None or self.batches > 0, "validation.batches", "positive or null", self.batches)


@dataclass(kw_only=True)
class EngineOptions:
    """What runs the model, and how it trades memory for time."""

    name: EngineName | None = None
    """torch or bmtrain; when not given, what the environment variable MODEL_CENTER_ENGINE says, else torch."""
    use_checkpoint: bool | None = None
    """Compute activations again in backward, to save memory; by default on CUDA only."""
    zero_level: Literal[2, 3] = 3
    """With several processes, 3 shards a block's parameters between its uses, and 2 keeps them from its forward to its
    backward pass."""

    def __post_init__(self) -> None:
        if self.name is not None:
            require_choice("engine.name", self.name, EngineName)
        require(self.zero_level in (2, 3), "engine.zero_level", "2 or 3", self.zero_level)


@dataclass(kw_only=True)
class PretrainConfig:
    """Pre-train a model of any family on indexed data sets."""

    output: str
    """Run directory; it must not exist yet, or be empty, unless a run in it is resumed."""
    seed: int = 0
    """Seed of the weights, of dropout and of the order of the samples."""
    max_steps: int = 1000
    """Training steps of the whole run."""
    log_every: int = 10
    """Print a line every so many steps where the output is not a terminal."""
    model: PretrainModelOptions
    """The model that is pre-trained, of any family."""
    data: PretrainDataOptions
    """Indexed data sets of token ids, and how they become samples."""
    batch: BatchOptions = field(default_factory=BatchOptions)
    """How many samples make a training step, and how many of them are computed at once."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """AdamW, its learning-rate schedule and gradient clipping."""
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    """When a run saves all it needs to go on, and what of it is kept."""
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    """When the run measures its loss on samples that it does not train on."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """What runs the model, and how it trades memory for time."""
    watch: WatchOptions = field(default_factory=WatchOptions)
    """What is done about losses that leap or are no numbers."""

    def __post_init__(self) -> None:
        require(bool(self.output), "output", "a directory", self.output)
        require(self.seed >= 0, "seed", "zero or positive", self.seed)
        require(self.max_steps > 0, "max_steps", "positive", self.max_steps)
        require(self.log_every > 0, "log_every", "positive", self.log_every)
        warmup = self.optimizer.warmup_steps
        if warmup is not None and warmup > self.max_steps:
            raise ValueError(f"optimizer.warmup_steps must be at most max_steps ({self.max_steps}), but is {warmup}")

    def resolved(self) -> "PretrainConfig":
        """Return a copy that means the same from any working directory: local paths are absolute."""
        text, tokenizer = self.data.text, _absolute_if_local(self.data.tokenizer)
        if text is not None and not text.startswith(SAMPLE):
            text = _absolute(text)
        return replace(
            self,
            output=_absolute(self.output),
            model=replace(self.model, name=_absolute_if_local(self.model.name)),
            data=replace(self.data, path=_absolute(self.data.path), text=text, tokenizer=tokenizer),
        )

    def to_yaml(self) -> str:
        """Return the configuration as YAML, which `--config` reads."""
        return to_yaml(self)


def to_yaml(config: "FinetuneConfig | PretrainConfig") -> str:
    """Return a configuration as YAML."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


@dataclass(kw_only=True)
class ReportConfig:
    """Compare runs in a table and a plot, whether they are finished, running or crashed."""

    runs: list[str]
    """Run directories."""
    plot: str | None = None
    """Picture to draw the losses of all runs into; its suffix decides the format, e.g. .png."""

    def __post_init__(self) -> None:
        suffixes = (".png", ".pdf", ".svg")
        is_picture = self.plot is None or self.plot.endswith(suffixes)
        require(is_picture, "plot", f"a file that ends in {', '.join(suffixes)}", self.plot)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _absolute_if_local(name: str) -> str:
    return _absolute(name) if Path(name).expanduser().exists() else name
