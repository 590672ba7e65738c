"""What a run measures, and the recorders that keep it as JSON lines and TensorBoard events."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch.utils.tensorboard import SummaryWriter

from model_center.engine import atomic_write

from .valid_json import valid_json

LARGEST_EXPONENT = 709
"""The exponential of anything larger is infinite in 64 bits."""


def perplexity_of(loss: float) -> float:
    """Return the perplexity for a mean cross-entropy in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < LARGEST_EXPONENT else math.inf if loss == loss else math.nan


@dataclass(frozen=True)
class LossMetrics:
    """A loss at a step of a run."""

    step: int
    """Training steps done; that of a training step itself is among them."""
    loss: float
    """Mean cross-entropy over all processes: of target tokens, or of samples where a task has classes."""

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return perplexity_of(self.loss)


@dataclass(frozen=True)
class StepMetrics(LossMetrics):
    """One training step. What has a default is None where it is not known."""

    kind: ClassVar[str] = "train"
    epoch: float
    """Passes over the training split done."""
    learning_rate: float
    """Learning rate of this step."""
    gradient_norm: float
    """Norm of all gradients before clipping."""
    seconds: float
    """Time the step took, data loading included."""
    samples_per_second: float
    """Samples of the step, over all processes, by that time."""
    tokens: int | None = None
    """Real tokens of the step, padding excluded, over all processes."""
    tokens_per_second: float | None = None
    """These by that time."""
    tflops: float | None = None
    """Floating-point operations of the model a second and GPU, in 10^12 (see `training_flops`)."""
    peak_share: float | None = None
    """These as a share of what the GPU can do."""
    memory_gib: float | None = None
    """Largest memory so far: that tensors have taken of this process's GPU, or that this process has taken on a CPU."""
    loss_scale: float | None = None
    """What the loss was multiplied by before backward."""


@dataclass(frozen=True)
class ValidationMetrics(LossMetrics):
    """One pass over the validation data of a pre-training run."""

    kind: ClassVar[str] = "validation"
    tokens: int
    """Real tokens read, over all processes."""


@dataclass(frozen=True)
class EvaluationMetrics(LossMetrics):
    """One evaluation of a whole split."""

    kind: ClassVar[str] = "evaluation"
    epoch: float
    """Passes over the training split done before."""
    measure: str
    """The task's first official measure, such as accuracy; it tells which checkpoint is the best."""
    score: float
    """Its value, from 0 to 1."""
    baseline: float
    """Its value for always giving the split's commonest answer."""
    scores: Mapping[str, float]
    """All official measures of the task by name."""
    samples: int
    """Samples evaluated."""


Metrics = StepMetrics | ValidationMetrics | EvaluationMetrics


class Recorder(Protocol):
    """Something that is told every training step and every evaluation of a run."""

    def record(self, metrics: Metrics) -> None:
        """Take note of one step or evaluation."""

    def close(self) -> None:
        """The run is over, whether well or not."""


def known_of(metrics: Metrics) -> dict[str, Any]:
    """Return what is known by name; the perplexity, too, where the loss is one of tokens."""
    known = {name: value for name, value in asdict(metrics).items() if value is not None}
    return known | {"perplexity": metrics.perplexity} if "tokens" in known else known


def numbers_of(metrics: Metrics) -> dict[str, float]:
    """Return what is known as numbers by name, without the step: what is drawn over the steps."""
    if isinstance(metrics, EvaluationMetrics):
        return {"loss": metrics.loss, **metrics.scores}
    return {name: value for name, value in known_of(metrics).items() if name != "step"}


class JsonLines:
    """Appends one JSON object a line, readable at once, with a `kind` of "train", "validation" or "evaluation".

    Args:
        path: the file; an earlier one is replaced, or continued with `resumed_after`.
        resumed_after: step that the run goes on after. What the file holds of later steps, which will come again, is
            cut off, as is a line that a killed process has left half-written.
    """

    def __init__(self, path: Path, *, resumed_after: int | None = None) -> None:
        if resumed_after is not None and path.exists():
            kept = (record for record in read_metrics(path) if record["step"] <= resumed_after)
            with atomic_write(path) as file:
                for record in kept:
                    file.write(_line(record).encode())
        self.file = path.open("w" if resumed_after is None else "a", encoding="utf-8", buffering=1)

    def record(self, metrics: Metrics) -> None:
        """Append one line; what is not known is left out, and what is no number (NaN, an infinity) is null."""
        self.file.write(_line({"kind": metrics.kind, **known_of(metrics)}))

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _line(record: Mapping[str, Any]) -> str:
    return valid_json(record) + "\n"


class TensorBoard:
    """Writes scalars: `<kind>/<name>` for every number of a step or validation, and for all measures of an evaluation.

    Args:
        directory: where the event files are.
        resumed_after: step that the run goes on after; TensorBoard then hides what it has of later steps.
    """

    def __init__(self, directory: Path, *, resumed_after: int | None = None) -> None:
        purge_step = None if resumed_after is None else resumed_after + 1
        self.writer = SummaryWriter(str(directory), purge_step=purge_step)

    def record(self, metrics: Metrics) -> None:
        """Add the scalars."""
        for name, value in numbers_of(metrics).items():
            self.writer.add_scalar(f"{metrics.kind}/{name}", value, metrics.step)

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


@contextmanager
def recording(*recorders: Recorder) -> Iterator[Callable[[Metrics], None]]:
    """Close all recorders on leaving, the last one first.

    Yields:
        What gives a step or an evaluation to all of them.
    """
    with ExitStack() as stack:
        for recorder in recorders:
            stack.callback(recorder.close)

        def record(metrics: Metrics) -> None:
            for recorder in recorders:
                recorder.record(metrics)

        yield record


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a `metrics.jsonl`, with NaN for null; a last line that was cut short is left out.

    A killed process leaves such a line. Files that name NaN and infinities, which is no JSON, are read as well.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line, object_hook=_with_nan)


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in record.items()}


def valid_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl` without those that a rewind of the run has undone."""
    records: list[dict[str, Any]] = []
    last_step = 0
    for record in read_metrics(path):
        if record["kind"] == "train":
            if record["step"] <= last_step:
                records = [earlier for earlier in records if earlier["step"] < record["step"]]
            last_step = record["step"]
        records.append(record)
    return records
