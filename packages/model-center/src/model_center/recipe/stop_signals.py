"""Signals that ask a run to end after its step."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

SAME_REQUEST = 3.0
"""Seconds within which signals are one request: schedulers signal a launcher and its processes, and launchers pass on
what they get."""


class StopSignals:
    """Whether a signal has asked the run to end after its step."""

    stop = False
    _asked_at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of handlers
        """Take note of a signal; one that comes later than with the first ends the process at once."""
        if not self.stop:
            self.stop, self._asked_at = True, monotonic()
        elif monotonic() - self._asked_at > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


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
