"""How a run shows itself while it goes on: a live bar on a terminal, plain lines elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .metrics import EvaluationMetrics, Metrics, Recorder, StepMetrics


def show_progress(console: Console, total_steps: int, log_every: int) -> Recorder:
    """Return what suits the console: a live bar on a terminal, otherwise a line every `log_every` steps."""
    return LiveProgress(console, total_steps) if console.is_terminal else PlainProgress(console, total_steps, log_every)


class LiveProgress:
    """One bar with epoch, loss, learning rate, samples a second and time left; a line above it for each evaluation."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]:.2f}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task("", total=total_steps, epoch=0.0)
        self.progress.start()

    def record(self, metrics: Metrics) -> None:
        """Move the bar, or print an evaluation."""
        if isinstance(metrics, StepMetrics):
            # Short enough for a terminal of 80 columns, where rich would cut the time left.
            numbers = (
                f"loss {metrics.loss:.3f} lr {metrics.learning_rate:.1e} {metrics.samples_per_second:.1f} samples/s"
            )
            self.progress.update(self.task, completed=metrics.step, description=numbers, epoch=metrics.epoch)
        else:
            self.progress.console.print(evaluation_line(metrics), highlight=False)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        self.progress.stop()


class PlainProgress:
    """A line for the first and last step, for every so many between them, and for each evaluation."""

    def __init__(self, console: Console, total_steps: int, log_every: int) -> None:
        self.console = console
        self.total_steps = total_steps
        self.log_every = log_every
        self.elapsed = 0.0

    def record(self, metrics: Metrics) -> None:
        """Print the line, if it is this step's turn."""
        if isinstance(metrics, EvaluationMetrics):
            line = evaluation_line(metrics)
        else:
            self.elapsed += metrics.seconds
            if metrics.step % self.log_every and metrics.step not in (1, self.total_steps):
                return
            left = self.elapsed / metrics.step * (self.total_steps - metrics.step)
            minutes, seconds = divmod(round(left), 60)
            line = (
                f"step {metrics.step}/{self.total_steps} | epoch {metrics.epoch:.2f} | loss {metrics.loss:.4f} | "
                f"lr {metrics.learning_rate:.2e} | gradient {metrics.gradient_norm:.2f} | "
                f"{metrics.samples_per_second:.1f} samples/s | left {minutes}:{seconds:02d}"
            )
        self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is left open."""


def evaluation_line(metrics: EvaluationMetrics) -> str:
    """Return an evaluation in one line of text."""
    scores = " | ".join(f"{name} {score:.1%}" for name, score in metrics.scores.items())
    return (
        f"evaluation after step {metrics.step} (epoch {metrics.epoch:.2f}): loss {metrics.loss:.4f} | {scores} | "
        f"{metrics.measure} of the majority class {metrics.baseline:.1%} | {metrics.samples} samples"
    )
