"""What a run of any kind can be told: documented dataclasses that are also the command's options and its YAML file."""

import difflib
import glob
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Precision = Literal["half", "bf16", "fp32"]
Schedule = Literal["linear", "cosine", "noam", "constant"]
EngineName = Literal["torch", "bmtrain"]
WandbMode = Literal["disabled", "offline", "online"]
HIGHEST_LEARNING_RATE = 1.0
"""No schedule of AdamW trains with a larger one."""


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


def require_outside(output: str, inputs: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError if something that a run reads lies in its output directory, where it might be deleted.

    Args:
        output: the directory, as `absolute` gives it.
        inputs: options and what they name, as `absolute` gives it where it is local.
    """
    for option, place in inputs:
        if Path(place).is_relative_to(output):
            raise ValueError(
                f"{option} must lie outside the output directory {output!r}, where an earlier run may be deleted, "
                f"but is {place!r}; move it, or give another output"
            )


@dataclass(kw_only=True)
class OutputOptions:
    """What every training run is told: where it is written, and what it draws."""

    output: str
    """Run directory; it must not exist yet, or be empty, unless an earlier run in it is overwritten (or resumed, in
    pre-training)."""
    seed: int = 0
    """Seed of new weights, of dropout and of the order of the samples."""
    log_every: int = 10
    """Print a line every so many steps where the output is not a terminal."""

    def __post_init__(self) -> None:
        require(bool(self.output), "output", "a directory", self.output)
        require(self.seed >= 0, "seed", "zero or positive", self.seed)
        require(self.log_every > 0, "log_every", "positive", self.log_every)


@dataclass(kw_only=True)
class PrecisionOptions:
    """The type that a model is trained in."""

    precision: Precision = "half"
    """Type of weights and activations: half is fp16 on CUDA and fp32 on the CPU, bf16 is the one to take on current
    GPUs; the optimizer keeps fp32 master weights in either case."""

    def __post_init__(self) -> None:
        require_choice("model.precision", self.precision, Precision)


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
class EngineOptions:
    """What runs the model, and how it trades memory for time."""

    name: EngineName | None = None
    """Either torch or bmtrain; when not given, what the environment variable MODEL_CENTER_ENGINE says, else torch."""
    use_checkpoint: bool | None = None
    """Compute activations again in backward, to save memory; by default on CUDA only, and not with an
    activation_budget."""
    zero_level: Literal[2, 3] = 3
    """With several processes, 3 shards a block's parameters between its uses, and 2 keeps them from its forward to its
    backward pass."""
    compile: bool = False
    """Compile the model's blocks, which makes the first steps take much longer and all later ones less."""
    activation_budget: float | None = None
    """Share of the activations that compiled blocks keep for backward, from 0 to 1, to save memory: what is cheapest to
    compute is computed again. Takes the place of use_checkpoint."""
    deterministic: bool = False
    """Compute the same bits whenever the run is repeated on the same machine, which may take longer."""

    def __post_init__(self) -> None:
        if self.name is not None:
            require_choice("engine.name", self.name, EngineName)
        require(self.zero_level in (2, 3), "engine.zero_level", "2 or 3", self.zero_level)
        budget, option = self.activation_budget, "engine.activation_budget"
        require(budget is None or 0 <= budget <= 1, option, "from 0 to 1", budget)
        require(budget is None or self.compile, option, "left out without engine.compile", budget)
        require(budget is None or not self.use_checkpoint, option, "left out with engine.use_checkpoint", budget)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `model_center.engine.init_distributed`."""
        return {"engine" if name == "name" else name: value for name, value in asdict(self).items()}


@dataclass(kw_only=True)
class WandbOptions:
    """Whether metrics go to Weights & Biases, too, with the package wandb, the extra of that name."""

    mode: WandbMode = "disabled"
    """online sends them as they come, offline keeps them in the run directory until wandb sync sends them."""
    project: str = "model-center"
    """Project at Weights & Biases."""
    name: str | None = None
    """The run's name there; that of its directory by default."""

    def __post_init__(self) -> None:
        require_choice("wandb.mode", self.mode, WandbMode)
        require(bool(self.project), "wandb.project", "a name", self.project)


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


def to_yaml(config: Any) -> str:
    """Return a configuration, a dataclass, as YAML."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def absolute(path: str) -> str:
    """Return the same path from any working directory."""
    return str(Path(path).expanduser().resolve())


def absolute_pattern(text: str) -> str:
    """Return a file, or a glob pattern of files, that means the same from any working directory."""
    path = Path(text).expanduser()
    if path.is_file() or not glob.has_magic(text):
        return absolute(text)
    begins = next(place for place, part in enumerate(path.parts) if glob.has_magic(part))
    # The folder is no pattern, though its name may look like one.
    folder = glob.escape(absolute(str(Path(*path.parts[:begins]))))
    return str(Path(folder, *path.parts[begins:]))


def absolute_if_local(name: str) -> str:
    """Return the absolute path of what exists here; other names, as those of the hub, as they are."""
    return absolute(name) if Path(name).expanduser().exists() else name
