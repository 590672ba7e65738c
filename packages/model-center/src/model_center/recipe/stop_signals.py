"""Signals that ask a run to end after its step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignals:
    """Whether a signal has asked the run to end after its step."""

    stop = False

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of handlers
        """Take note of a signal; the second one ends the process at once."""
        self.stop = True
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Let SIGTERM and SIGINT ask for the end of the run instead of ending the process."""
    asked = StopSignals()
    previous = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
