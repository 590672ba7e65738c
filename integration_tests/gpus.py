"""Which engines there are, and what they need of a machine."""

from importlib.util import find_spec

import pytest
import torch

ENGINES = ("torch", "bmtrain")


def require(engine: str, processes: int) -> None:
    """Skips what this machine cannot run."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs, but there are {torch.cuda.device_count()}")
    if engine == "bmtrain" and find_spec("bmtrain") is None:
        pytest.skip("needs bmtrain, which is not installed")
