"""What converting and verifying checkpoints can be told."""

from dataclasses import dataclass, field, fields
from typing import Literal

from .configuration import require, require_choice

Layout = Literal["model_center", "transformers"]
StoredType = Literal["float64", "float32", "float16", "bfloat16"]
ComputedType = Literal["float64", "float32"]


@dataclass(kw_only=True)
class ConvertConfig:
    """Convert a checkpoint between Transformers' layout and ours, tensor by tensor."""

    source: str
    """Directory or identifier of the checkpoint: of Transformers, of ours, or of ModelCenter 0.1 to 1.0."""
    output: str
    """Directory to write, which must not exist."""
    to: Layout | None = None
    """model_center or transformers; by default what the source is not."""
    family: str | None = None
    """The model's family, which directories of ModelCenter 0.1 to 1.0 do not name."""
    dtype: StoredType | None = None
    """Type of the weights that are written; by default each keeps its own, to the last bit."""
    max_file_bytes: int = 5_000_000_000
    """Larger checkpoints are spread over several files."""

    def __post_init__(self) -> None:
        if self.to is not None:
            require_choice("to", self.to, Layout)
        if self.dtype is not None:
            require_choice("dtype", self.dtype, StoredType)
        require(self.max_file_bytes > 0, "max_file_bytes", "positive", self.max_file_bytes)


@dataclass(kw_only=True)
class Tolerances:
    """Largest differences that pass, relatively to the largest value of the tensor that is compared."""

    weights: float | None = None
    """Of weights: 1e-6 by default, which leaves room for a rescaled residual stream only."""
    states: float | None = None
    """Of the hidden states of each layer: 1e-5 by default, and 1e-10 for BERT and GPT-2 in float64."""
    logits: float | None = None
    """Of logits: the same."""
    gradients: float | None = None
    """Of the gradient of each parameter: 1e-4 by default, and 1e-10 for BERT and GPT-2 in float64."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            require(value is None or value >= 0, f"tolerances.{option.name}", "zero or positive", value)


@dataclass(kw_only=True)
class VerifyConfig:
    """Compare a checkpoint with a Transformers directory: names, weights, logits and gradients of every parameter."""

    checkpoint: str
    """Directory of the checkpoint: of ours, a step of a pre-training run, or of ModelCenter 0.1 to 1.0."""
    against: str
    """Directory of the Transformers model."""
    dtype: ComputedType = "float32"
    """What both sides compute in, on the CPU."""
    text: str | None = None
    """File of sample text, as pre-training reads it; by default a passage of Shakespeare, or random ids where neither
    directory holds a tokenizer."""
    rows: int = 4
    """Rows of the sample, the later ones shorter."""
    length: int = 64
    """Tokens of the longest row."""
    seed: int = 0
    """Seed of random ids."""
    worst: int = 5
    """How many of the largest differences are shown of each check."""
    certificate: str | None = None
    """File to write the result to, as JSON, with versions and checksums."""
    tolerances: Tolerances = field(default_factory=Tolerances)
    """What passes."""

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, ComputedType)
        require(self.rows > 0, "rows", "positive", self.rows)
        require(self.length >= 8, "length", "at least 8", self.length)
        require(self.worst > 0, "worst", "positive", self.worst)
