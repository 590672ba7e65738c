"""Loss and score of a run as a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .metrics import EvaluationMetrics, Metrics, read_metrics

Values = npt.NDArray[np.float64]
STEP, TREND, EVALUATION, BASELINE = "#a9bfdc", "#2b5c9e", "#c4432b", "#6b6b6b"


class Plot:
    """A recorder that draws the run after each evaluation, and once more at the end if it was left between two."""

    def __init__(self, metrics: Path, picture: Path, title: str) -> None:
        self.files = (metrics, picture)
        self.title = title
        self.is_behind = False

    def record(self, metrics: Metrics) -> None:
        """Draw the picture if this is an evaluation."""
        self.is_behind = True
        if isinstance(metrics, EvaluationMetrics):
            self._draw()

    def close(self) -> None:
        """Draw what has come since the last evaluation."""
        if self.is_behind:
            self._draw()

    def _draw(self) -> None:
        plot_run(*self.files, self.title)
        self.is_behind = False


def plot_run(metrics: Path, picture: Path, title: str) -> None:
    """Draw the training loss, the evaluations' loss, and their score beside the majority baseline.

    Args:
        metrics: the run's `metrics.jsonl`.
        picture: file to write; its suffix decides the format.
        title: heading of the figure.
    """
    records = list(read_metrics(metrics))
    training = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    loss_axes, score_axes = figure.subplots(1, 2, sharex=True)

    steps, losses = _column(training, "step"), _column(training, "loss")
    window = len(losses) // 20
    loss_axes.plot(steps, losses, color=STEP if window > 1 else TREND, linewidth=0.9, label="training, each step")
    if window > 1:
        trend = f"training, mean of {window} steps"
        loss_axes.plot(steps, trailing_mean(losses, window), color=TREND, linewidth=2, label=trend)
    _plot_evaluations(loss_axes, evaluations, "loss")
    loss_axes.margins(y=0.1)
    loss_axes.set(title="Cross-entropy loss", xlabel="step", ylim=(0, None))
    loss_axes.legend(frameon=False, loc="lower left")

    _plot_evaluations(score_axes, evaluations, "score")
    score_axes.set(xlabel="step")
    if evaluations:
        best = max(evaluations, key=lambda record: record["score"])
        baseline, measure = best["baseline"], best["measure"].replace("_", " ")
        score_axes.set_title(measure.capitalize())
        label = f"always the majority class, {baseline:.1%}"
        score_axes.axhline(baseline, color=BASELINE, linestyle="--", label=label)
        at = (best["step"], best["score"])
        score_axes.annotate(f"best {best['score']:.1%}", at, (0, 9), textcoords="offset points", ha="right")
        shown = np.append(_column(evaluations, "score"), baseline)
        score_axes.set_ylim(max(0, shown.min() - 0.1), min(1.02, shown.max() + 0.1))
    score_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    score_axes.legend(frameon=False, loc="lower left")
    for axes in (loss_axes, score_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(picture, dpi=150)


def _plot_evaluations(axes: Axes, evaluations: list[dict[str, Any]], name: str) -> None:
    steps, values = _column(evaluations, "step"), _column(evaluations, name)
    axes.plot(steps, values, color=EVALUATION, marker="o", linewidth=1.5, label="evaluation after each epoch")


def _column(records: list[dict[str, Any]], name: str) -> Values:
    return np.array([record[name] for record in records], dtype=float)


def trailing_mean(values: Values, window: int) -> Values:
    """Return the mean of each value and those before it, at most `window` of them."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    means: Values = (sums[ends] - sums[starts]) / (ends - starts)
    return means
