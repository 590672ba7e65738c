"""Tokenized corpora in Megatron's indexed format: writing, reading, checking; numpy only."""

from .builder import MMapIndexedDatasetBuilder, make_builder
from .format import IndexedDatasetError, best_fitting_dtype
from .manifest import Manifest
from .reader import MMapIndexedDataset

__all__ = [
    "IndexedDatasetError",
    "MMapIndexedDataset",
    "MMapIndexedDatasetBuilder",
    "Manifest",
    "best_fitting_dtype",
    "make_builder",
]
