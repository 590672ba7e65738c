"""The command `mc-preprocess`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from . import __version__
from .encoders import CausalLMEncoder, CPM1Encoder
from .executors import LocalExecutor, WorkerDiedError
from .progress import ProgressBar
from .reading import BadBytes, InputFormat, ReadOptions
from .tokenization import Layout, tokenize_files

ENCODERS = {"causal-lm": CausalLMEncoder, "cpm1": CPM1Encoder}


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
        workers: Number of processes. The result is the same for any number.
        part_bytes: About how much text a worker takes at a time, and may lose when it is killed.
        overwrite: Replace data sets that exist, and give up an unfinished run with other arguments.
    """
    with ProgressBar("tokenize") as progress:
        counts = tokenize_files(
            input,
            output,
            ENCODERS[encoder](tokenizer),
            options=ReadOptions(format=format, field=field, bad_bytes=bad_bytes, part_bytes=part_bytes),
            layout=layout,
            executor=LocalExecutor(workers),
            overwrite=overwrite,
            watcher=progress,
        )
    seconds, here = max(progress.seconds, 1e-9), progress.here
    print(f"{counts.documents:,} documents, {counts.sequences:,} sequences, {counts.tokens:,} tokens")
    print(f"{here.bytes / seconds / 1e6:.1f} MB/s, {here.tokens / seconds:,.0f} tokens/s")
    for number, what in ((counts.dropped, "lines gave no sequence"), (counts.replaced, "invalid bytes were replaced")):
        if number:
            print(f"{number:,} {what}")


COMMANDS: dict[str, Callable[..., None]] = {"tokenize": tokenize}


def build_parser() -> ArgumentParser:
    """Return the parser of the whole command; the functions' docstrings are its help."""
    parser = ArgumentParser(prog="mc-preprocess", description="From raw text to indexed training data.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subcommands(dest="command", required=True)
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        command = ArgumentParser(description=function.__doc__ and function.__doc__.partition("    Args:")[0].strip())
        command.add_argument("--config", action="config", help="YAML file with any of the options below.")
        command.add_function_arguments(function, as_positional=False)
        for action in command._actions:
            if action.dest == "input":
                action.nargs = "+"  # so that --input *.txt works, as shells expand it
            elif action.default is False:
                action.nargs, action.const = "?", True  # so that --overwrite works without a value
        commands.add_subcommand(name, command, help=summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; by default what the process was started with.

    Returns:
        The exit status: 0, 2 when an argument or an input is at fault, 1 for anything else.
    """
    parsed = build_parser().parse_args(arguments)
    options = vars(parsed[parsed.command])
    options.pop("config", None)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        COMMANDS[parsed.command](**options)
    except ValueError as error:
        console.print(f"[red]error:[/] {error}", markup=True)
        return 2
    except (OSError, ImportError, WorkerDiedError) as error:
        console.print(f"[red]error:[/] {error}", markup=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
