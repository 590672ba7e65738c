"""Which engines there are, and what they need of a machine."""

from importlib.util import find_spec

import pytest
from shared_gpus import most_processes

ENGINES = ("torch", "bmtrain")


def require(engine: str, processes: int) -> None:
    """Skips what this machine cannot run."""
    if most_processes() < processes:
        pytest.skip(f"needs {processes} GPUs, but there are {most_processes()}")
    if engine == "bmtrain" and find_spec("bmtrain") is None:
        pytest.skip("needs bmtrain, which is not installed")
