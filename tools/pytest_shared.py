"""Pytest plugin of the whole workspace: the shared material beside the checkout, and the same signals everywhere."""

import os
import signal
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("MODEL_CENTER_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def pytest_configure() -> None:
    """Heeds interrupts even in the background of a script, so that processes which tests start and interrupt do."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Golden files and real data: `MODEL_CENTER_SHARED`, else `shared` beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared material, expected at {SHARED}")
    return SHARED
