"""Which engine runs this process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from model_center.engine.base import Engine
from model_center.engine.torch_engine import TorchEngine

EngineT = TypeVar("EngineT", bound=Engine)

# A plain variable, not a context variable: autograd runs backward, and with it recomputed blocks, in other threads.
_current: Engine | None = None


def current_engine() -> Engine:
    """The engine in use: that of `use_engine` or `init_distributed`, otherwise plain PyTorch on the default device."""
    global _current  # noqa: PLW0603
    if _current is None:
        _current = TorchEngine()
    return _current


@contextmanager
def use_engine(engine: EngineT) -> Iterator[EngineT]:
    """Runs a block of code under `engine`: layers constructed in it belong to that engine."""
    global _current  # noqa: PLW0603
    previous, _current = _current, engine
    try:
        yield engine
    finally:
        _current = previous


def init_distributed(seed: int = 0, *, use_checkpoint: bool | None = None) -> None:
    """Starts the engine. Call it once, before anything else of this package.

    Args:
        seed: Seeds the random generators of torch, Python and NumPy (if installed), from 0 to 2**32 - 1.
        use_checkpoint: Whether blocks recompute their activations in backward, which saves memory and costs a third
            more computation; by default on CUDA only.

    Raises:
        ValueError: If `seed` is out of range or the process was launched as one of several.
    """
    global _current  # noqa: PLW0603
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be from 0 to 2**32 - 1, but is {seed}")
    engine = TorchEngine(use_checkpoint=use_checkpoint)
    if engine.device.type == "cuda":
        torch.cuda.set_device(engine.device)
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        import numpy as np
    except ModuleNotFoundError:  # torch works without it
        pass
    else:
        np.random.seed(seed)  # noqa: NPY002 - the generator that data code shares
    _current = engine
