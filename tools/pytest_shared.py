"""Pytest plugin of the whole workspace: the shared material beside the checkout, and the same signals everywhere."""

import os
import signal
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def golden_model(shared_dir: Path) -> Callable[[str], Path]:
    """Finds the folder of one of the original's models by its name; skips without it."""

    def find(name: str) -> Path:
        folder = shared_dir / "golden" / "models" / name
        if not folder.is_dir():
            pytest.skip(f"needs a golden model, expected at {folder}")
        return folder

    return find
