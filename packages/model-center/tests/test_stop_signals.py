import os
import signal

import pytest
from checkpoint_training import exit_codes, start_processes

from model_center.recipe import stop_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_and_its_repetition_ask_once(number: signal.Signals) -> None:
    """A launcher and a scheduler may both send it."""
    before = signal.getsignal(number)
    with stop_signals.stop_signals() as asked:
        assert not asked.stop
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert asked.stop
    assert signal.getsignal(number) == before


def insist(seconds: float) -> None:
    stop_signals.SAME_REQUEST = seconds
    with stop_signals.stop_signals():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    raise SystemExit(3)


def test_a_later_signal_ends_the_process_at_once() -> None:
    assert exit_codes(start_processes(insist, 1, 60.0)) == [3]
    assert exit_codes(start_processes(insist, 1, -1.0)) == [-signal.SIGTERM]
