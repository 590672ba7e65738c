"""What many tests need."""

from collections.abc import Iterator

import pytest
import torch

from model_center.engine import TorchEngine, use_engine


@pytest.fixture
def cpu_engine() -> Iterator[None]:
    """One process on the CPU; an engine that a test sets up is forgotten after it."""
    with use_engine(TorchEngine(torch.device("cpu"))):
        yield
