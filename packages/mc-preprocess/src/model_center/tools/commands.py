"""The sub-commands of `mc-preprocess`: their arguments, and what they print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from model_center.dataset.indexed import MMapIndexedDataset, repair_dataset, verify_dataset
from model_center.tokenizer import Tokenizer

from .encoders import CausalLMEncoder, CPM1Encoder
from .executors import Executor, LocalExecutor
from .inspection import Summary, decoded_samples, plot_lengths, summarize
from .progress import ProgressBar
from .ray_executor import RayExecutor
from .reading import BadBytes, InputFormat, ReadOptions
from .reshaping import merge_datasets, require_tokenizer, split_dataset, unique_prefixes
from .shuffling import shuffle_lines
from .tokenization import Layout, tokenize_files

ENCODERS = {"causal-lm": CausalLMEncoder, "cpm1": CPM1Encoder}
EXECUTORS: dict[str, Callable[[int], Executor]] = {"local": LocalExecutor, "ray": RayExecutor}
OUT = Console(soft_wrap=True, highlight=False, markup=False)


class ProblemsFoundError(Exception):
    """A check found problems, which are printed already."""


def tokenize(
    input: list[str],
    output: str,
    tokenizer: str,
    *,
    encoder: Literal["causal-lm", "cpm1"] = "causal-lm",
    format: InputFormat = "auto",
    field: str = "text",
    bad_bytes: BadBytes = "error",
    layout: Layout = "numbered",
    executor: Literal["local", "ray"] = "local",
    workers: int = 1,
    part_bytes: int = 16 << 20,
    overwrite: bool = False,
) -> None:
    """Turn text files into indexed data sets.

    A run that was killed goes on where it was when the same command is given again.

    Args:
        input: Text, JSON lines or Parquet files, also with .gz or .zst; - is standard input.
        output: Input 1, 2, ... becomes the data set OUTPUT_1, OUTPUT_2, ...
        tokenizer: Directory, vocabulary file or identifier of the tokenizer.
        encoder: causal-lm: each line is one document, ended by the tokenizer's end-of-document id. cpm1: <n> becomes a
            line break, and documents are cut into pieces of 512 tokens, of which those under 32 are dropped.
        format: text is one document per line, jsonl one JSON object per line; auto goes by the file's name.
        field: JSON field or Parquet column that holds the text.
        bad_bytes: What to do with invalid UTF-8: stop, or replace and count it.
        layout: numbered makes a data set of each input, single one of all.
        executor: local works in processes of this machine, ray on a Ray cluster that shares its file system.
        workers: Number of processes, with ray of parts at a time. The result is the same for any number.
        part_bytes: About how much text a worker takes at a time, and may lose when it is killed.
        overwrite: Replace data sets that exist, and give up an unfinished run with other arguments.
    """
    made = ENCODERS[encoder](tokenizer)
    with ProgressBar("tokenize") as progress:
        counts = tokenize_files(
            input,
            output,
            made,
            options=ReadOptions(format=format, field=field, bad_bytes=bad_bytes, part_bytes=part_bytes),
            layout=layout,
            executor=EXECUTORS[executor](workers),
            overwrite=overwrite,
            watcher=progress,
        )
    seconds, here = max(progress.seconds, 1e-9), progress.here
    OUT.print(f"{counts.documents:,} documents, {counts.sequences:,} sequences, {counts.tokens:,} tokens")
    OUT.print(f"{here.bytes / seconds / 1e6:.1f} MB/s, {here.tokens / seconds:,.0f} tokens/s")
    for number, what in ((counts.dropped, "lines gave no sequence"), (counts.replaced, "invalid bytes were replaced")):
        if number:
            OUT.print(f"{number:,} {what}")


def shuffle(
    input: list[str], output: str, *, seed: int = 0, memory_bytes: int = 256 << 20, overwrite: bool = False
) -> None:
    """Put the lines of files in random order, also when they do not fit into memory.

    Args:
        input: Text or JSON lines files, also with .gz or .zst.
        output: The file that gets all lines.
        seed: Chooses the order.
        memory_bytes: About how much memory to use.
        overwrite: Replace a file that exists.
    """
    lines = shuffle_lines(input, output, seed=seed, memory_bytes=memory_bytes, overwrite=overwrite)
    OUT.print(f"{lines:,} lines in {output}")


def merge(input: list[str], output: str, *, overwrite: bool = False) -> None:
    """Append data sets to each other.

    Args:
        input: Their prefixes, or their files.
        output: Prefix of the new data set.
        overwrite: Replace a data set that exists.
    """
    merge_datasets(input, output, overwrite=overwrite)
    OUT.print(repr(MMapIndexedDataset(output)))


def split(input: str, output: str, weights: list[float], *, overwrite: bool = False) -> None:
    """Divide a data set into several, between documents.

    Args:
        input: Prefix of the data set.
        output: The parts become OUTPUT_1, OUTPUT_2, ...
        weights: Share of the documents that each part gets, such as 98 1 1.
        overwrite: Replace data sets that exist.
    """
    for prefix in split_dataset(input, output, weights, overwrite=overwrite):
        OUT.print(repr(MMapIndexedDataset(prefix)))


def inspect(
    input: list[str], *, tokenizer: str | None = None, samples: int = 3, seed: int = 0, plot: str | None = None
) -> None:
    """Show what data sets hold.

    Args:
        input: Their prefixes, or their files.
        tokenizer: The tokenizer that made them, to show samples as text.
        samples: Number of samples, chosen at random.
        seed: Chooses the samples.
        plot: PNG file for the histogram of lengths; only with one data set.
    """
    prefixes = unique_prefixes(input)
    if plot is not None and len(prefixes) != 1:
        raise ValueError(f"`plot` needs exactly one data set, but `input` names {len(prefixes)}")
    loaded = _load(tokenizer)
    for prefix in prefixes:
        summary = summarize(prefix)
        _show(prefix, summary)
        if loaded is not None:
            for number, text in decoded_samples(prefix, loaded, samples, seed):
                OUT.print(f"sequence {number}: {text}")
        if plot is not None:
            plot_lengths(prefix, summary, Path(plot))


def _show(prefix: Path, summary: Summary) -> None:
    OUT.print(
        f"{prefix}: {summary.documents:,} documents, {summary.sequences:,} sequences, {summary.tokens:,} tokens of "
        f"{summary.dtype}"
    )
    for name, value in summary.provenance.items():
        OUT.print(f"  {name}: {value}")
    table = Table("tokens per sequence", "sequences", "", box=None)
    most = max(1, int(summary.counts.max()))
    edges = summary.edges.tolist()
    for first, end, count in zip(edges[:-1], edges[1:], summary.counts.tolist(), strict=True):
        table.add_row(f"{first:,} to {end - 1:,}", f"{count:,}", "█" * round(40 * count / most))
    OUT.print(table)
    OUT.print(f"shortest {summary.shortest:,}, median {summary.median:,.1f}, longest {summary.longest:,}")


def verify(input: list[str], *, tokenizer: str | None = None) -> None:
    """Check every checksum, offset and, with a tokenizer, id of data sets.

    Args:
        input: Their prefixes, or their files.
        tokenizer: The tokenizer that made them: every id must lie in its vocabulary.
    """
    loaded = _load(tokenizer)
    found = 0
    for prefix in unique_prefixes(input):
        problems = verify_dataset(prefix, vocab_size=None if loaded is None else len(loaded))
        if loaded is not None and MMapIndexedDataset.exists(prefix):
            try:
                require_tokenizer(MMapIndexedDataset(prefix), loaded)
            except ValueError as error:
                problems = list(dict.fromkeys([*problems, str(error)]))
        for problem in problems:
            OUT.print(problem)
        if not problems:
            OUT.print(f"{prefix}: no problem found")
        found += len(problems)
    if found:
        raise ProblemsFoundError


def repair(input: list[str]) -> None:
    """Mend data sets without guessing: document boundaries, manifests, publications that were cut short.

    Args:
        input: Their prefixes, or their files.
    """
    for prefix in unique_prefixes(input):
        for action in repair_dataset(prefix) or ["nothing to do"]:
            OUT.print(f"{prefix}: {action}")


def _load(tokenizer: str | None) -> Tokenizer | None:
    if tokenizer is None:
        return None
    from model_center.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer)
