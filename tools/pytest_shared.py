"""Pytest plugin of the whole workspace: the folder of shared material beside the checkout."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout (golden files, real data); skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared material, expected at {SHARED}")
    return SHARED
