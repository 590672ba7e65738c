"""What a run measures, and the recorders that keep it: JSON lines and TensorBoard events."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepMetrics:
    """One training step."""

    kind: ClassVar[str] = "train"
    step: int
    """Steps done, this one included."""
    epoch: float
    """Passes over the training split done."""
    loss: float
    """Mean cross-entropy of the step's samples, over all processes."""
    learning_rate: float
    """Learning rate of this step."""
    gradient_norm: float
    """Norm of all gradients before clipping."""
    seconds: float
    """Time the step took, data loading included."""
    samples_per_second: float
    """Samples of the step, over all processes, by that time."""


@dataclass(frozen=True)
class EvaluationMetrics:
    """One evaluation of a whole split."""

    kind: ClassVar[str] = "evaluation"
    step: int
    """Training steps done before."""
    epoch: float
    """Passes over the training split done before."""
    loss: float
    """Mean cross-entropy of all samples."""
    measure: str
    """The task's first official measure, such as accuracy; it tells which checkpoint is the best."""
    score: float
    """Its value, from 0 to 1."""
    baseline: float
    """Its value for always answering the split's most frequent class."""
    scores: Mapping[str, float]
    """All official measures of the task by name."""
    samples: int
    """Samples evaluated."""


Metrics = StepMetrics | EvaluationMetrics


class Recorder(Protocol):
    """Something that is told every training step and every evaluation of a run."""

    def record(self, metrics: Metrics) -> None:
        """Take note of one step or evaluation."""

    def close(self) -> None:
        """The run is over, whether well or not."""


class JsonLines:
    """Appends one JSON object a line, readable at once, with a `kind` of "train" or "evaluation"."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8", buffering=1)

    def record(self, metrics: Metrics) -> None:
        """Append one line."""
        self.file.write(json.dumps({"kind": metrics.kind} | asdict(metrics)) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """Writes scalars: `train/<name>` for every number of a step, `evaluation/<name>` for the loss and all measures."""

    def __init__(self, directory: Path) -> None:
        self.writer = SummaryWriter(str(directory))

    def record(self, metrics: Metrics) -> None:
        """Add the scalars."""
        if isinstance(metrics, EvaluationMetrics):
            values = {"loss": metrics.loss, **metrics.scores}
        else:
            values = {name: value for name, value in asdict(metrics).items() if name != "step"}
        for name, value in values.items():
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
    """Yield the records of a `metrics.jsonl`; a last line cut short by a killed process is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
