"""Tokenized corpora in Megatron's indexed format: writing, reading, checking; numpy only."""

from .builder import MMapIndexedDatasetBuilder, make_builder
from .distributed import DistributedMMapIndexedDataset
from .format import IndexedDatasetError, best_fitting_dtype
from .manifest import Manifest
from .reader import MMapIndexedDataset
from .verification import repair_dataset, verify_dataset

__all__ = [
    "DistributedMMapIndexedDataset",
    "IndexedDatasetError",
    "MMapIndexedDataset",
    "MMapIndexedDatasetBuilder",
    "Manifest",
    "best_fitting_dtype",
    "make_builder",
    "repair_dataset",
    "verify_dataset",
]
