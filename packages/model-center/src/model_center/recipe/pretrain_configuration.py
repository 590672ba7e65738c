"""What `model-center pretrain` and `plan` can be told."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .configuration import (
    EngineOptions,
    OptimizerOptions,
    OutputOptions,
    PrecisionOptions,
    WandbOptions,
    absolute,
    absolute_if_local,
    absolute_pattern,
    require,
    require_choice,
    to_yaml,
)

Objective = Literal["causal", "prefix", "context", "masked", "spans"]
SAMPLE = "sample:"
"""What the name of a text that comes with this package begins with."""
AnomalyPolicy = Literal["warn", "skip", "rewind", "stop"]


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
    divergence: float | None = 2.0
    """The run stops when losses stay above that of its first step times this; null never stops it for that."""
    patience: int = 10
    """Skipped steps in a row, or diverged ones, after which the run stops."""
    max_rewinds: int = 3
    """Rewinds of a run after which it stops instead of rewinding again."""

    def __post_init__(self) -> None:
        require_choice("watch.non_finite", self.non_finite, AnomalyPolicy)
        require_choice("watch.spike", self.spike, AnomalyPolicy)
        require(self.window > 1, "watch.window", "above 1", self.window)
        require(self.factor > 0, "watch.factor", "positive", self.factor)
        divergence = self.divergence
        require(divergence is None or divergence > 1, "watch.divergence", "above 1 or null", divergence)
        require(self.patience > 0, "watch.patience", "positive", self.patience)
        require(self.max_rewinds > 0, "watch.max_rewinds", "positive", self.max_rewinds)


@dataclass(kw_only=True)
class PretrainModelOptions(PrecisionOptions):
    """The model that is pre-trained, of any family."""

    name: str
    """A published size such as gpt2-base, bert-base-uncased or t5-small for a fresh model of that size, or the
    directory of a checkpoint or of a configuration (config.json)."""
    from_scratch: bool | None = None
    """true begins with random weights, false with those of the directory; when not given, weights are used where there
    are some."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the model's configuration that differ from those of name, e.g. --model.options.num_layers 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.name), "model.name", "a directory or the name of a published size", self.name)
        for option in ("dtype", "half"):
            if option in self.options:
                raise ValueError(f"model.options.{option} is decided by model.precision; leave it out")


@dataclass(kw_only=True)
class ObjectiveOptions:
    """What a model learns from sequences of token ids."""

    objective: Objective | None = None
    """What the model learns to do: causal (GPT-2), prefix, context (CPM-1), masked (BERT) or spans (T5); by default
    that of the model's family."""
    max_length: int = 512
    """Longest sample in tokens, of an encoder-decoder on the encoder's side. Raw text is cut into pieces of that length
    when it is tokenized; of a longer sequence in data sets that exist already, the rest is never trained on."""
    max_target_length: int | None = None
    """Longest sample on the decoder's side (spans only); by default there is room for all that max_length leads to."""
    mask_share: float | None = None
    """Share of the tokens that is masked (masked and spans only); 0.15 by default."""
    mean_span: float | None = None
    """Mean length of a masked span in tokens (spans only); 3 by default."""
    whole_words: bool = False
    """Mask all pieces of a word together (masked only, with a WordPiece vocabulary)."""

    def __post_init__(self) -> None:
        if self.objective is not None:
            require_choice("data.objective", self.objective, Objective)
        share, span, target = self.mask_share, self.mean_span, self.max_target_length
        require(self.max_length >= 4, "data.max_length", "at least 4", self.max_length)
        require(target is None or target >= 3, "data.max_target_length", "at least 3", target)
        require(share is None or 0 < share < 1, "data.mask_share", "above 0 and below 1", share)
        require(span is None or span >= 1, "data.mean_span", "at least 1", span)


@dataclass(kw_only=True)
class PretrainDataOptions(ObjectiveOptions):
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
    pack: bool = True
    """Put several short samples into one row, which see nothing of each other; otherwise each row is padded."""
    full_rows: bool = False
    """Read the data sets as one stream of tokens, cut into rows of max_length (causal only): no token is lost to
    cutting or padding, and a sample is a row, which may begin or end within a document."""
    fixed_shape: bool = False
    """Pad every row to full length, so that all batches have one shape; otherwise to the longest of its micro-batch."""
    validation_name: str | None = None
    """Common start of the names of the validation files; when not given, validation_share of the samples is held
    out."""
    validation_share: float = 0.01
    """Share of the training samples that is held out for validation where there are no files for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("path", "name", "tokenizer"):
            require(bool(getattr(self, name)), f"data.{name}", "given", getattr(self, name))
        if self.full_rows and not self.pack:
            raise ValueError(
                "data.pack must be true with data.full_rows, whose rows hold several documents, but is False"
            )
        share = self.validation_share
        require(0 < share < 1, "data.validation_share", "above 0 and below 1", share)
        if self.validation_name == self.name:
            raise ValueError(f"data.validation_name must differ from data.name, but both are {self.name!r}")

    @property
    def corpus(self) -> str:
        """What is trained on, in a word: the name of the raw text or, where there is none, of the data sets' folder."""
        return Path(self.path if self.text is None else self.text.removeprefix(SAMPLE)).name

    @property
    def objective_options(self) -> ObjectiveOptions:
        """What concerns the objective alone."""
        return ObjectiveOptions(**{each.name: getattr(self, each.name) for each in fields(ObjectiveOptions)})


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
class PretrainConfig(OutputOptions):
    """Pre-train a model of any family on indexed data sets."""

    max_steps: int = 1000
    """Training steps of the whole run."""
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
    wandb: WandbOptions = field(default_factory=WandbOptions)
    """Whether metrics go to Weights & Biases, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_steps > 0, "max_steps", "positive", self.max_steps)
        warmup = self.optimizer.warmup_steps
        if warmup is not None and warmup > self.max_steps:
            raise ValueError(f"optimizer.warmup_steps must be at most max_steps ({self.max_steps}), but is {warmup}")

    def resolved(self) -> "PretrainConfig":
        """Return a copy that means the same from any working directory: local paths are absolute."""
        text, tokenizer = self.data.text, absolute_if_local(self.data.tokenizer)
        if text is not None and not text.startswith(SAMPLE):
            text = absolute_pattern(text)
        return replace(
            self,
            output=absolute(self.output),
            model=replace(self.model, name=absolute_if_local(self.model.name)),
            data=replace(self.data, path=absolute(self.data.path), text=text, tokenizer=tokenizer),
        )

    def to_yaml(self) -> str:
        """Return the configuration as YAML, which `--config` reads."""
        return to_yaml(self)
