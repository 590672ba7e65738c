"""Looking at data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model_center.dataset.indexed import MMapIndexedDataset
from model_center.dataset.indexed.format import StrPath, complete_boundaries
from model_center.tokenizer import Tokenizer

from .reshaping import require_tokenizer

_HISTOGRAM_BINS = 12


@dataclass(frozen=True)
class Summary:
    """What a data set holds.

    Attributes:
        dtype: Name of the token type.
        documents: Number of documents.
        sequences: Number of sequences.
        tokens: Number of tokens.
        shortest: Tokens of the shortest sequence.
        median: Median of the sequences' lengths.
        longest: Tokens of the longest sequence.
        edges: Edges of the bins of the histogram of lengths, of shape (bins + 1,); whole numbers, growing with length.
        counts: Sequences in each bin, of shape (bins,).
        provenance: What the manifest tells of the origin.
    """

    dtype: str
    documents: int
    sequences: int
    tokens: int
    shortest: int
    median: float
    longest: int
    edges: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    provenance: dict[str, Any]


def summarize(path: StrPath) -> Summary:
    """Count what a data set holds.

    Raises:
        ValueError: It is missing or damaged.
    """
    dataset = MMapIndexedDataset(path)
    sizes = dataset.sizes if len(dataset) else np.zeros(1, np.int32)
    longest = int(sizes.max())
    edges = np.unique(np.rint(np.geomspace(1, longest + 1, _HISTOGRAM_BINS + 1)).astype(np.int64))
    edges[0] = 0
    edges = np.append(edges, 1) if len(edges) == 1 else edges
    return Summary(
        dtype=dataset.dtype.name,
        documents=len(complete_boundaries(dataset.doc_idx, len(dataset))) - 1,
        sequences=len(dataset),
        tokens=len(dataset.tokens),
        shortest=int(sizes.min()),
        median=float(np.median(sizes)),
        longest=longest,
        edges=edges,
        counts=np.histogram(dataset.sizes, edges)[0].astype(np.int64),
        provenance=dict(dataset.manifest.provenance) if dataset.manifest else {},
    )


def decoded_samples(path: StrPath, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[tuple[int, str]]:
    """Decode sequences chosen at random.

    Args:
        path: Prefix of the data set, or one of its files.
        tokenizer: The one that made it.
        count: How many.
        seed: Chooses them.

    Returns:
        Number and text of each, in the order of the numbers.

    Raises:
        ValueError: The manifest tells of another tokenizer.
    """
    dataset = MMapIndexedDataset(path)
    require_tokenizer(dataset, tokenizer)
    chosen = np.random.default_rng(seed).choice(len(dataset), min(count, len(dataset)), replace=False)
    return [(number, tokenizer.decode(dataset[number].tolist())) for number in sorted(chosen.tolist())]


def plot_lengths(path: StrPath, summary: Summary, target: Path) -> None:
    """Draw the histogram of lengths.

    Args:
        path: What the title names.
        summary: Of the data set.
        target: The PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs the extra: pip install 'mc-preprocess[plot]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.stairs(summary.counts, summary.edges, fill=True)
    axes.set(title=str(path), xlabel="tokens per sequence", ylabel="sequences")
    figure.savefig(target, dpi=120, format="png")
