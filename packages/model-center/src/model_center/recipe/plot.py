"""Runs as pictures: one run's metrics over its steps, and the losses of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from .metrics import Metrics, StepMetrics, valid_records

Values = npt.NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]
STEP, TREND, EVALUATION, BASELINE = "#a9bfdc", "#2b5c9e", "#c4432b", "#6b6b6b"
LARGEST_SHARE = 0.01
"""Part of a run's time that may go into drawing it while it trains; a drawing takes longer the longer the run."""


class Plot:
    """A recorder that draws the run after evaluations, where that takes little of its time, and always at the end."""

    def __init__(self, metrics: Path, picture: Path, title: str) -> None:
        self.files = (metrics, picture)
        self.title = title
        self.is_behind = False
        self.rests_until = monotonic()
        """When the time since the last drawing is long enough for another one."""

    def record(self, metrics: Metrics) -> None:
        """Draw the picture if this is a validation or an evaluation, and the last drawing was long enough ago."""
        self.is_behind = True
        if not isinstance(metrics, StepMetrics) and monotonic() >= self.rests_until:
            self._draw()

    def close(self) -> None:
        """Draw what has come since the last drawing."""
        if self.is_behind:
            self._draw()

    def _draw(self) -> None:
        started = monotonic()
        plot_run(*self.files, self.title)
        self.is_behind = False
        ended = monotonic()
        self.rests_until = ended + (ended - started) / LARGEST_SHARE


def plot_run(metrics: Path, picture: Path, title: str) -> None:
    """Draw a run: of fine-tuning loss and score; of pre-training loss, learning rate, gradient norm, speed and memory.

    Args:
        metrics: the run's `metrics.jsonl`.
        picture: file to write; its suffix decides the format.
        title: heading of the figure.
    """
    records = valid_records(metrics)
    training = [record for record in records if record["kind"] == "train"]
    is_pretraining = any(record["kind"] == "validation" or "tokens_per_second" in record for record in records)
    figure = Figure(figsize=(10, 9 if is_pretraining else 4.2), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    if is_pretraining:
        all_axes = _draw_pretraining(figure, training, _of_kind(records, "validation"))
    else:
        all_axes = _draw_finetuning(figure, training, _of_kind(records, "evaluation"))
    for axes in all_axes:
        axes.set_xlabel("step")
        _tidy(axes)
    figure.savefig(picture, dpi=150)


def plot_losses(runs: Mapping[str, Records], picture: Path) -> None:
    """Draw the smoothed training losses of several runs, and their validations or evaluations as points.

    Args:
        runs: name of each run and its records.
        picture: file to write; its suffix decides the format.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    drawn = []
    for name, records in runs.items():
        training = _of_kind(records, "train")
        trend = trailing_mean(_column(training, "loss"), _window(training))
        (line,) = axes.plot(_column(training, "step"), trend, linewidth=1.5, label=name)
        held_out = [record for record in records if record["kind"] != "train"]
        values = _column(held_out, "loss")
        axes.plot(_column(held_out, "step"), values, "o", markersize=5, color=line.get_color())
        drawn += [trend, values]
    axes.set(title="Loss: training smoothed, validation as points", xlabel="step", ylabel="cross-entropy")
    axes.set_ylim(*_loss_limits(np.concatenate(drawn)))
    axes.legend(frameon=False)
    _tidy(axes)
    figure.savefig(picture, dpi=150)


def _draw_finetuning(figure: Figure, training: Records, evaluations: Records) -> Sequence[Axes]:
    loss_axes, score_axes = figure.subplots(1, 2, sharex=True)
    _plot_trend(loss_axes, training, "loss", "training")
    _plot_results(loss_axes, evaluations, "loss", "evaluation after each epoch")
    loss_axes.margins(y=0.1)
    loss_axes.set(title="Cross-entropy loss", ylim=(0, None))
    loss_axes.legend(frameon=False, loc="lower left")

    _plot_results(score_axes, evaluations, "score", "evaluation after each epoch")
    if evaluations:
        best = max(evaluations, key=lambda record: record["score"])
        baseline, measure = best["baseline"], best["measure"].replace("_", " ")
        score_axes.set_title(measure.capitalize())
        label = f"always the commonest answer, {baseline:.1%}"
        score_axes.axhline(baseline, color=BASELINE, linestyle="--", label=label)
        _annotate(score_axes, best, "score", f"best {best['score']:.1%}")
        shown = np.append(_column(evaluations, "score"), baseline)
        score_axes.set_ylim(max(0, shown.min() - 0.1), min(1.02, shown.max() + 0.1))
    score_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    score_axes.legend(frameon=False, loc="lower left")
    return loss_axes, score_axes


def _draw_pretraining(figure: Figure, training: Records, validations: Records) -> Sequence[Axes]:
    above, below = ["learning_rate", "gradient_norm", "tokens_per_second"], ["perplexity", "tflops", "memory_gib"]
    mosaic: Any = [["loss"] * 3, above, below]
    places = figure.subplot_mosaic(mosaic, height_ratios=[1.8, 1, 1])
    _draw_loss(places["loss"], training, validations)
    for name in (*above, *below):
        _plot_trend(places[name], training, name, smooth=name not in ("learning_rate", "memory_gib"))
    _plot_results(places["perplexity"], validations, "perplexity", "validation")

    places["learning_rate"].set(title="Learning rate", ylim=(0, None))
    places["learning_rate"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for name, title in (("gradient_norm", "Gradient norm"), ("perplexity", "Perplexity")):
        places[name].set_title(title)
        if np.any(_column(training, name) > 0):
            places[name].set_yscale("log")
            places[name].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            places[name].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            places[name].yaxis.set_minor_formatter(NullFormatter())
    places["tokens_per_second"].set(title="Tokens per second", ylim=(0, None))
    places["tokens_per_second"].yaxis.set_major_formatter(EngFormatter(sep=""))
    places["tflops"].set(title="FLOP/s of each device", ylim=(0, None))
    places["tflops"].yaxis.set_major_formatter(lambda value, _: EngFormatter(sep="")(value * 1e12))
    places["memory_gib"].margins(y=0.1)
    places["memory_gib"].set(title="Most memory so far, GiB", ylim=(0, None))
    return list(places.values())


def _draw_loss(axes: Axes, training: Records, validations: Records) -> None:
    _plot_trend(axes, training, "loss", "training")
    _plot_results(axes, validations, "loss", "validation")
    trend = trailing_mean(_column(training, "loss"), _window(training))
    axes.set_ylim(*_loss_limits(np.append(trend, _column(validations, "loss"))))
    axes.set(title="Cross-entropy loss")
    axes.legend(frameon=False, loc="upper right")
    if finite := [record for record in validations if np.isfinite(record["loss"])]:
        best = min(finite, key=lambda record: record["loss"])
        _annotate(axes, best, "loss", f"best {best['loss']:.3f} (perplexity {np.exp(best['loss']):.4g})")


def _plot_trend(axes: Axes, training: Records, name: str, label: str = "", *, smooth: bool = True) -> None:
    """Draw each step's value, and their trailing mean if there are enough to smooth."""
    steps, values = _column(training, "step"), _column(training, name)
    window = _window(training) if smooth else 1
    each = f"{label}, each step" if label else None
    axes.plot(steps, values, color=STEP if window > 1 else TREND, linewidth=0.9, label=each)
    if window > 1:
        trend = f"{label}, mean of {window} steps" if label else None
        axes.plot(steps, trailing_mean(values, window), color=TREND, linewidth=2, label=trend)


def _plot_results(axes: Axes, results: Records, name: str, label: str) -> None:
    axes.plot(
        _column(results, "step"), _column(results, name), color=EVALUATION, marker="o", linewidth=1.5, label=label
    )


def _annotate(axes: Axes, record: Mapping[str, Any], name: str, text: str) -> None:
    at = (record["step"], record[name])
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.annotate(text, at, (0, 14), textcoords="offset points", ha="right", bbox=paper)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _loss_limits(losses: Values) -> tuple[float | None, float | None]:
    """Return limits of the axis that show the curve rather than the few highest losses of its beginning."""
    finite = losses[np.isfinite(losses)]
    if finite.size == 0:
        return None, None
    low, high = finite.min(), max(np.quantile(finite, 0.98), finite[-1])
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin


def _of_kind(records: Records, kind: str) -> list[Mapping[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _window(training: Records) -> int:
    """Return how many steps a smoothed line averages."""
    return max(1, len(training) // 50)


def _column(records: Records, name: str) -> Values:
    """Return one number of each record, NaN where it is not known."""
    return np.array([record.get(name, np.nan) for record in records], dtype=float)


def trailing_mean(values: Values, window: int) -> Values:
    """Return the mean of each value and those before it, at most `window` of them, leaving out what is no number."""
    finite = np.isfinite(values)
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(finite, values, 0.0), finite))
    totals, numbers = sums[ends] - sums[starts], counts[ends] - counts[starts]
    means: Values = np.divide(totals, numbers, out=np.full(len(values), np.nan), where=numbers > 0)
    return means
