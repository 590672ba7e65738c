"""Merging and splitting data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model_center.dataset.indexed import MMapIndexedDataset, MMapIndexedDatasetBuilder
from model_center.dataset.indexed.format import StrPath, complete_boundaries, prefix_of
from model_center.tokenizer import Tokenizer


def unique_prefixes(paths: Sequence[StrPath]) -> list[Path]:
    """Return the data sets that are meant, each once: `data_*` expands to several files of each."""
    return list(dict.fromkeys(prefix_of(path) for path in paths))


def tokenizer_of(dataset: MMapIndexedDataset) -> Mapping[str, Any]:
    """Return what the manifest tells of the tokenizer; nothing where it tells nothing."""
    tokenizer = dataset.manifest.provenance.get("tokenizer") if dataset.manifest else None
    return tokenizer if isinstance(tokenizer, Mapping) else {}


def require_tokenizer(dataset: MMapIndexedDataset, tokenizer: Tokenizer) -> None:
    """Check that a tokenizer is the one that made a data set, as far as its manifest tells.

    Raises:
        ValueError: It is another one.
    """
    known = tokenizer_of(dataset)
    if known.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ValueError(
            f"`tokenizer` must be the one that made {dataset.prefix} ({known.get('name')}, fingerprint "
            f"{known['fingerprint'][:12]}…), but is {tokenizer.name} ({tokenizer.fingerprint[:12]}…)"
        )


def require_absent(prefix: Path, *, overwrite: bool) -> None:
    """Check that a data set may be written.

    Raises:
        ValueError: It exists, and may not be replaced.
    """
    if not overwrite and MMapIndexedDataset.exists(prefix):
        raise ValueError(f"`output`: the data set {prefix} exists; `overwrite` replaces it")


def merge_datasets(inputs: Sequence[StrPath], output: StrPath, *, overwrite: bool = False) -> None:
    """Append data sets to each other.

    Args:
        inputs: Their prefixes, or any of their files.
        output: Prefix of the new data set.
        overwrite: Whether a data set that exists is replaced, when the new one is complete.

    Raises:
        ValueError: One is missing or damaged, their dtypes or tokenizers differ, or the output exists.
    """
    prefix = prefix_of(output)
    require_absent(prefix, overwrite=overwrite)
    datasets = [MMapIndexedDataset(path) for path in unique_prefixes(inputs)]
    if not datasets:
        raise ValueError("`inputs` must name at least one data set")
    known = [(dataset, tokenizer_of(dataset)) for dataset in datasets if tokenizer_of(dataset)]
    for dataset, tokenizer in known[1:]:
        first, expected = known[0]
        if tokenizer.get("fingerprint") != expected.get("fingerprint"):
            raise ValueError(
                f"the inputs must come from one tokenizer, but {first.prefix} is {expected.get('name')}'s and "
                f"{dataset.prefix} {tokenizer.get('name')}'s, with other fingerprints"
            )
    provenance: dict[str, Any] = {"merged": [str(dataset.prefix) for dataset in datasets]}
    provenance |= {"tokenizer": dict(known[0][1])} if known else {}
    with MMapIndexedDatasetBuilder(prefix, datasets[0].dtype, provenance=provenance) as builder:
        for dataset in datasets:
            builder.merge_file_(dataset.prefix)


def split_dataset(source: StrPath, output: StrPath, weights: Sequence[float], *, overwrite: bool = False) -> list[Path]:
    """Divide a data set into several, between documents.

    Args:
        source: Prefix of the data set, or one of its files.
        output: The parts become `<output>_1`, `<output>_2`, …
        weights: How many of the documents each part gets, in proportion: `[98, 1, 1]`, or `[1, 1, 1, 1]` for quarters.
        overwrite: Whether data sets that exist are replaced, each when the new one is complete.

    Returns:
        The prefixes of the parts.

    Raises:
        ValueError: The source is missing or damaged, a weight is negative, all are 0, or an output exists.
    """
    if not weights or min(weights) < 0 or not sum(weights):
        raise ValueError(f"`weights` must be numbers from 0 on, one of them above 0, but are {list(weights)}")
    dataset = MMapIndexedDataset(source)
    prefixes = [Path(f"{output}_{number}") for number in range(1, len(weights) + 1)]
    for prefix in prefixes:
        require_absent(prefix, overwrite=overwrite)
    boundaries = complete_boundaries(dataset.doc_idx, len(dataset))
    shares = np.cumsum([0.0, *weights]) / sum(weights)
    cuts = np.rint(shares * (len(boundaries) - 1)).astype(int).tolist()
    provenance = dict(dataset.manifest.provenance) if dataset.manifest else {}
    ends = np.cumsum(dataset.sizes, dtype=np.int64)
    for prefix, first, last in zip(prefixes, cuts[:-1], cuts[1:], strict=True):
        begin, end = int(boundaries[first]), int(boundaries[last])
        origin = {"split": str(dataset.prefix), "documents": [first, last]}
        with MMapIndexedDatasetBuilder(prefix, dataset.dtype, provenance=provenance | origin) as builder:
            tokens = dataset.tokens[int(ends[begin - 1]) if begin else 0 : int(ends[end - 1]) if end else 0]
            builder.add_flat(tokens, dataset.sizes[begin:end])
            builder.add_boundaries(boundaries[first + 1 : last + 1] - begin)
    return prefixes
