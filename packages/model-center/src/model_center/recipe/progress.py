"""How a run shows itself while it goes on: a live bar on a terminal, plain lines elsewhere."""

from collections import deque
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from .metrics import EvaluationMetrics, Metrics, Recorder, StepMetrics, ValidationMetrics

RECENT_STEPS = 100
"""Steps whose mean duration tells the time left."""


def show_progress(console: Console, total_steps: int, log_every: int) -> Recorder:
    """Return what suits the console: a live bar on a terminal, otherwise a line every `log_every` steps."""
    return LiveProgress(console, total_steps) if console.is_terminal else PlainProgress(console, total_steps, log_every)


class TimeLeft:
    """Tells how long a run will still take if it goes on as fast as in its last steps, in this process."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def after(self, metrics: StepMetrics) -> str:
        """Take note of a step and return the time left, e.g. `1:02:03`."""
        self.seconds.append(metrics.seconds)
        return duration(sum(self.seconds) / len(self.seconds) * (self.total_steps - metrics.step))


class LiveBar(Progress):
    """A progress bar, and a line of further numbers below it if there are any."""

    details = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar and the line."""
        yield from super().get_renderables()
        if self.details:
            yield Text(self.details, no_wrap=True, overflow="ellipsis")


class LiveProgress:
    """A bar with the most important numbers and the time left, a line of the others below it in pre-training.

    A validation or evaluation is a line above it.
    """

    def __init__(self, console: Console, total_steps: int) -> None:
        self.time_left = TimeLeft(total_steps)
        self.progress = LiveBar(
            TextColumn("epoch {task.fields[epoch]:.2f}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left {task.fields[left]}"),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task("", total=total_steps, epoch=0.0, left="--:--")
        self.progress.start()

    def record(self, metrics: Metrics) -> None:
        """Move the bar, or print a validation or an evaluation."""
        if isinstance(metrics, StepMetrics):
            # Short enough for a terminal of 80 columns, where rich would cut the time left.
            numbers = f"loss {metrics.loss:.3f} lr {metrics.learning_rate:.1e} {speed(metrics)}"
            left = self.time_left.after(metrics)
            self.progress.details = " | ".join(details(metrics))
            self.progress.update(self.task, completed=metrics.step, description=numbers, epoch=metrics.epoch, left=left)
        else:
            self.progress.console.print(result_line(metrics), highlight=False)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        self.progress.stop()


class PlainProgress:
    """A line for the first and last step, for every so many between them, and for each validation or evaluation."""

    def __init__(self, console: Console, total_steps: int, log_every: int) -> None:
        self.console = console
        self.total_steps = total_steps
        self.log_every = log_every
        self.time_left = TimeLeft(total_steps)
        self.has_begun = False

    def record(self, metrics: Metrics) -> None:
        """Print the line, if it is this step's turn."""
        if isinstance(metrics, StepMetrics):
            left = self.time_left.after(metrics)
            if metrics.step % self.log_every and metrics.step != self.total_steps and self.has_begun:
                return
            self.has_begun = True
            numbers = [
                f"step {metrics.step}/{self.total_steps} | epoch {metrics.epoch:.2f} | loss {metrics.loss:.4f}",
                f"lr {metrics.learning_rate:.2e} | gradient norm {metrics.gradient_norm:.2f} | {speed(metrics)}",
                *details(metrics, gradient_norm=False),
                f"left {left}",
            ]
            line = " | ".join(numbers)
        else:
            line = result_line(metrics)
        self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is left open."""


def speed(metrics: StepMetrics) -> str:
    """Return tokens a second where they are counted, samples a second elsewhere."""
    if metrics.tokens_per_second is None:
        return f"{metrics.samples_per_second:.1f} samples/s"
    return f"{metrics.tokens_per_second:,.0f} tokens/s"


def details(metrics: StepMetrics, *, gradient_norm: bool = True) -> list[str]:
    """Return what else is known of a step of pre-training, each in a few words; nothing where tokens are not counted.

    Args:
        metrics: the step.
        gradient_norm: whether the gradient norm is among it.
    """
    if metrics.tokens_per_second is None:
        return []
    words = [f"perplexity {metrics.perplexity:.4g}"]
    if gradient_norm:
        words.append(f"gradient norm {metrics.gradient_norm:.2f}")
    if metrics.tflops is not None:
        share = "" if metrics.peak_share is None else f" ({metrics.peak_share:.1%} of peak)"
        words.append(operations(metrics.tflops) + share)
    if metrics.memory_gib is not None:
        words.append(f"{metrics.memory_gib:.1f} GiB")
    if metrics.loss_scale is not None:
        words.append(f"scale {metrics.loss_scale:g}")
    return words


def result_line(metrics: ValidationMetrics | EvaluationMetrics) -> str:
    """Return a validation or an evaluation in one line of text."""
    if isinstance(metrics, ValidationMetrics):
        return (
            f"validation after step {metrics.step}: loss {metrics.loss:.4f} | perplexity {metrics.perplexity:.4g} | "
            f"{metrics.tokens:,} tokens"
        )
    scores = " | ".join(f"{name} {score:.1%}" for name, score in metrics.scores.items())
    return (
        f"evaluation after step {metrics.step} (epoch {metrics.epoch:.2f}): loss {metrics.loss:.4f} | {scores} | "
        f"{metrics.measure} of the commonest answer {metrics.baseline:.1%} | {metrics.samples} samples"
    )


def operations(tflops: float) -> str:
    """Return 10^12 floating-point operations a second in a unit that suits, e.g. `3.2 GFLOP/s`."""
    for unit in ("TFLOP/s", "GFLOP/s"):
        if tflops >= 1:
            return f"{tflops:.3g} {unit}"
        tflops *= 1000
    return f"{tflops:.3g} MFLOP/s"


def count(number: int) -> str:
    """Return a number of parameters, in millions where there are so many."""
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,}"


def duration(seconds: float) -> str:
    """Return a time as `minutes:seconds`, with hours and days where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
