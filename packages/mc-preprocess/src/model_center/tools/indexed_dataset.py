"""The documented name (section 1.5.2) of what writes and reads indexed data sets, from `model_center.dataset`."""

from model_center.dataset.indexed import (
    IndexedDatasetError,
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
    best_fitting_dtype,
    make_builder,
)

__all__ = [
    "IndexedDatasetError",
    "MMapIndexedDataset",
    "MMapIndexedDatasetBuilder",
    "best_fitting_dtype",
    "make_builder",
]
