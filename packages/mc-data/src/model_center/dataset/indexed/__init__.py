"""Tokenized corpora in Megatron's indexed format: writing, reading, checking; numpy only."""

from .builder import MMapIndexedDatasetBuilder, make_builder
from .distributed import DistributedMMapIndexedDataset
from .format import IndexedDatasetError, best_fitting_dtype
from .manifest import Manifest
from .objectives import CausalLM, ContextSpan, MaskedLM, ObjectiveDataset, PrefixLM, SpanCorruption
from .packing import FullRows, PairedDataset, pack_samples
from .permutation import Permutation
from .reader import MMapIndexedDataset
from .row_packing import pack_rows
from .verification import repair_dataset, verify_dataset

__all__ = [
    "CausalLM",
    "ContextSpan",
    "DistributedMMapIndexedDataset",
    "FullRows",
    "IndexedDatasetError",
    "MMapIndexedDataset",
    "MMapIndexedDatasetBuilder",
    "Manifest",
    "MaskedLM",
    "ObjectiveDataset",
    "PairedDataset",
    "Permutation",
    "PrefixLM",
    "SpanCorruption",
    "best_fitting_dtype",
    "make_builder",
    "pack_rows",
    "pack_samples",
    "repair_dataset",
    "verify_dataset",
]
