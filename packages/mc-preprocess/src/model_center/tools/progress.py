"""What a run shows while it works."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .tokenization import Counts


class ProgressBar:
    """Bytes done, MB/s, documents/s, tokens/s and the time left, on standard error."""

    def __init__(self, title: str) -> None:
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar = self._progress.add_task(title, rates="")
        self._here = Counts()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._progress.tasks[0].elapsed or 0.0

    @property
    def here(self) -> Counts:
        """What this run did itself, without what an earlier one had done."""
        return self._here

    def started(self, total_bytes: int, done: Counts) -> None:
        """Show the size of the run, and what an earlier run did of it."""
        self._progress.update(self._bar, total=total_bytes, completed=done.bytes)

    def advanced(self, counts: Counts) -> None:
        """Show one more part."""
        self._here += counts
        seconds = max(self.seconds, 1e-9)
        rates = f"{self._here.documents / seconds:,.0f} docs/s, {self._here.tokens / seconds:,.0f} tokens/s"
        self._progress.update(self._bar, advance=counts.bytes, rates=rates)
