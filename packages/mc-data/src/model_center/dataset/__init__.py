"""Data sets: indexed corpora (numpy only), and task data sets and the loader (mc-data[torch])."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .indexed import (
    DistributedMMapIndexedDataset,
    IndexedDatasetError,
    MMapIndexedDataset,
    best_fitting_dtype,
    make_builder,
)

if TYPE_CHECKING:
    from .loader import DistributedDataLoader

__version__ = version("mc-data")
__all__ = [
    "DistributedDataLoader",
    "DistributedMMapIndexedDataset",
    "IndexedDatasetError",
    "MMapIndexedDataset",
    "__version__",
    "best_fitting_dtype",
    "make_builder",
]

_LAZY = {"DistributedDataLoader": "loader"}


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
