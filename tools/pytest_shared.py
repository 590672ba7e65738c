"""Pytest plugin of the whole workspace: the shared material beside the checkout, and the same signals everywhere."""

import signal
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Heeds interrupts even in the background of a script, so that processes which tests start and interrupt do."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout (golden files, real data); skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared material, expected at {SHARED}")
    return SHARED
