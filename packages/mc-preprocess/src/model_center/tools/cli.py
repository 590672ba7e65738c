"""The command `mc-preprocess`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from docstring_parser import parse
from jsonargparse import ArgumentParser
from rich.console import Console

from . import __version__, commands
from .executors import WorkerDiedError

COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        commands.tokenize,
        commands.shuffle,
        commands.merge,
        commands.split,
        commands.inspect,
        commands.verify,
        commands.repair,
    )
}


def build_parser() -> ArgumentParser:
    """Return the parser of the whole command; the functions' docstrings are its help."""
    parser = ArgumentParser(prog="mc-preprocess", description="From raw text to indexed training data.")
    parser.add_argument("--version", action="version", version=__version__)
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(
            name, _command_parser(function), help=parse(function.__doc__ or "").short_description
        )
    return parser


def _command_parser(function: Callable[..., None]) -> ArgumentParser:
    """Return the parser of one sub-command."""
    documentation = parse(function.__doc__ or "")
    command = ArgumentParser(description=documentation.description)
    command.add_argument("--config", action="config", help="YAML file with any of the options below.")
    several = {"list[str]": str, "list[float]": float}
    lists = {name: several[kind] for name, kind in function.__annotations__.items() if kind in several}
    for argument in documentation.params:
        if argument.arg_name in lists:  # declared here so that --input *.txt works, as shells expand it
            kind = lists[argument.arg_name]
            command.add_argument(
                f"--{argument.arg_name}", nargs="+", type=kind, required=True, help=argument.description
            )
    command.add_function_arguments(function, as_positional=False, skip=set(lists))
    for action in command._actions:
        if action.default is False:
            action.nargs, action.const = "?", True  # so that --overwrite works without a value
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; by default what the process was started with.

    Returns:
        The exit status: 0; 2 when an argument or an input is at fault; 1 when a check found problems, and for
        anything else; 130 when interrupted.
    """
    parsed = build_parser().parse_args(arguments)
    options = vars(parsed[parsed.command])
    options.pop("config", None)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        COMMANDS[parsed.command](**options)
    except commands.ProblemsFoundError:
        return 1
    except ValueError as error:
        console.print(f"error: {error}")
        return 2
    except (OSError, ImportError, WorkerDiedError) as error:
        console.print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; tokenize goes on from here when the same command is given again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
