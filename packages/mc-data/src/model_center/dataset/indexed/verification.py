"""Checking and repairing what is on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .builder import stage_index
from .durable import Staging, complete_publication, remove_stale
from .format import (
    Array,
    IndexedDatasetError,
    StrPath,
    complete_boundaries,
    file_of,
    index_problem,
    prefix_of,
)
from .manifest import BLOCK_BYTES, FileRecord, Manifest
from .reader import MMapIndexedDataset


def verify_dataset(path: StrPath, *, vocab_size: int | None = None) -> list[str]:
    """Check every byte of a data set that can be checked.

    Args:
        path: Its prefix, or one of its files.
        vocab_size: When given, every id must be smaller.

    Returns:
        What is wrong; nothing when all is well.
    """
    prefix = prefix_of(path)
    try:
        dataset = MMapIndexedDataset(prefix)
    except IndexedDatasetError as error:
        return [str(error)]
    problems = []
    index = file_of(prefix, ".idx")
    if problem := _index_problem(dataset, dataset.doc_idx):
        problems.append(f"{index}: {problem}")
    if dataset.doc_idx[-1] != len(dataset):
        problems.append(
            f"{index}: the last document ends at sequence {dataset.doc_idx[-1]} of {len(dataset)}, which Megatron "
            "refuses; `mc-preprocess repair` completes it"
        )
    if dataset.manifest is None:
        problems.append(f"{file_of(prefix, '.manifest.json')}: missing, so no checksum could be verified")
    else:
        problems += _all_damage(prefix, dataset.manifest)
    if vocab_size is not None:
        problems += _ids_outside(dataset, vocab_size)
    return problems


def _index_problem(dataset: MMapIndexedDataset, boundaries: Array) -> str | None:
    return index_problem(dataset.sizes, dataset.pointers, boundaries, dataset.dtype, dataset.tokens.nbytes)


def _all_damage(prefix: Path, manifest: Manifest) -> list[str]:
    return [
        text
        for suffix, record in manifest.files.items()
        for text in _damage(file_of(prefix, suffix), record, manifest.block_bytes)
    ]


def _damage(path: Path, record: FileRecord, block_bytes: int) -> list[str]:
    if path.stat().st_size != record.bytes:
        return [f"{path}: has {path.stat().st_size} bytes, but its manifest says {record.bytes}"]
    with path.open("rb") as stream:
        return [
            f"{path}: damaged between bytes {block * block_bytes} and {min(record.bytes, (block + 1) * block_bytes)}"
            for block in record.damaged_blocks(stream, block_bytes)
        ]


def _ids_outside(dataset: MMapIndexedDataset, vocab_size: int) -> list[str]:
    """Return the first sequence that holds an id outside the vocabulary."""
    step = BLOCK_BYTES // dataset.dtype.itemsize
    for start in range(0, len(dataset.tokens), step):
        block: Array = dataset.tokens[start : start + step]
        dataset.touched(1, len(block))
        outside = (block < 0) | (block >= vocab_size)
        if outside.any():
            at = start + int(outside.argmax())
            sequence = int(np.searchsorted(dataset.pointers, at * dataset.dtype.itemsize, side="right")) - 1
            wrong = dataset.tokens[at]
            return [f"{dataset.prefix}: sequence {sequence} holds the id {wrong}, outside 0 to {vocab_size - 1}"]
    return []


def repair_dataset(path: StrPath) -> list[str]:
    """Mend what can be mended without guessing.

    A publication that was cut short is completed, what killed writers left is removed, missing document boundaries are
    added (the original ModelCenter wrote none), and a manifest is written where it is missing or belongs to other
    files. The `.bin` file is never changed.

    Args:
        path: The data set's prefix, or one of its files.

    Returns:
        What was done; nothing when there was nothing to do.

    Raises:
        IndexedDatasetError: The data set is damaged, and what it held cannot be known.
    """
    prefix = prefix_of(path)
    done = []
    if complete_publication(prefix):
        done.append("completed the renames of a writer that was killed")
    if stale := remove_stale(prefix):
        done.append(f"removed {len(stale)} temporary files of writers that were killed")
    dataset = MMapIndexedDataset(prefix, use_manifest=False)
    boundaries = complete_boundaries(dataset.doc_idx, len(dataset))
    if problem := _index_problem(dataset, boundaries):
        raise IndexedDatasetError(f"{file_of(prefix, '.idx')}: {problem}; this cannot be repaired, build it again")
    provenance: dict[str, Any] = {}
    try:
        manifest = MMapIndexedDataset(prefix).manifest
    except IndexedDatasetError:
        done.append("replaced a manifest that is damaged or belongs to other files")
    else:
        if manifest is None:
            done.append("wrote a manifest")
        else:
            if damage := _all_damage(prefix, manifest):
                raise IndexedDatasetError(
                    "; ".join(damage) + ": this cannot be repaired, build it again. (If the files were replaced on "
                    f"purpose, remove {file_of(prefix, '.manifest.json')} first)"
                )
            provenance = dict(manifest.provenance)
    if len(boundaries) != len(dataset.doc_idx):
        done.append(f"completed the document boundaries: {len(boundaries) - 1} documents")
    if done:
        _rewrite(dataset, boundaries, provenance)
    return done


def _rewrite(dataset: MMapIndexedDataset, boundaries: Array, provenance: dict[str, Any]) -> None:
    """Write index and manifest anew beside the same `.bin` file."""
    staging = Staging(dataset.prefix)
    try:
        staging.keep(".bin")
        data = FileRecord.of(dataset.tokens.view(np.uint8).data)
        stage_index(staging, dataset.dtype, dataset.sizes, boundaries, data, provenance)
        staging.commit()
    finally:
        staging.discard()
