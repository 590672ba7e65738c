"""The `model-center` command: its options, their errors, and what is printed when a run has ended."""

import os
import re
import sys
from collections.abc import Sequence
from os import PathLike
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console

from . import __version__
from .configuration import FinetuneConfig, QuickstartConfig, nearest

COMMANDS = {"finetune": FinetuneConfig, "quickstart": QuickstartConfig}
USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 when interrupted.

    Args:
        arguments: the words after `model-center`; those of the process when not given.
    """
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    command = parsed.command
    # Of several processes that torchrun started, the first one speaks.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    try:
        options = parser.instantiate(parsed)[command].as_dict()
        overwrite, _ = options.pop("overwrite"), options.pop("config")
        config = COMMANDS[command](**options)
        # PyTorch and Transformers take seconds to import, which --help need not wait for.
        from model_center.engine import current_engine

        from .finetuning import prepare, train
        from .quickstart import quickstart_config

        if isinstance(config, QuickstartConfig):
            config = quickstart_config(config)
        with console.status("Loading model and data"):
            job = prepare(config, overwrite=overwrite)
    except (ValueError, OSError, ImportError) as error:
        fail(f"model-center {command}", str(error))
    except KeyboardInterrupt:
        return _interrupted(" before anything was written")
    try:
        result = train(job, console=console)
    except KeyboardInterrupt:
        return _interrupted(f"; {job.config.output} holds the metrics and checkpoints so far")
    best, run = result.best, result.run
    baseline = f"always the majority class: {best.baseline:.1%}"
    lines = {
        f"dev {best.measure}": f"{best.score:.1%} after epoch {best.epoch:.3g} ({baseline})",
        "plot": run.plot,
        "checkpoint": run.checkpoint("best"),
    }
    for name, value in lines.items():
        console.print(f"{name:<14}{value}", highlight=False, soft_wrap=True)
    current_engine().shutdown()
    return 0


def build_parser() -> ArgumentParser:
    """Return the parser of the whole command; options and their help come from the configuration's docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="model-center", description="Train language models.", version=__version__)
    commands = parser.add_subcommands(dest="command", required=True)
    for command, config_class in COMMANDS.items():
        usage = f"model-center {command} [--config FILE] [--option VALUE ...]"
        options = Parser(usage=usage, description=config_class.__doc__)
        options.add_argument("--config", action="config", help="YAML file with any of the options below.")
        options.add_argument("--overwrite", action="store_true", help="Delete an earlier run in the output directory.")
        options.add_class_arguments(config_class)
        commands.add_subcommand(command, options, help=(config_class.__doc__ or "").splitlines()[0])
    return parser


class Parser(ArgumentParser):
    """A parser whose errors are one message, with the nearest option for a misspelt one."""

    _reading: str | None = None

    def parse_path(self, cfg_path: str | PathLike[str], *arguments: Any, **options: Any) -> Namespace:
        """Read a configuration file, whose name is put before the errors found in it."""
        self._reading = str(cfg_path)
        parsed: Namespace = super().parse_path(cfg_path, *arguments, **options)
        self._reading = None
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with code 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        where = f"{self._reading}: " if self._reading else ""
        fail(parser.prog.replace("[options] ", ""), where + explain(message, parser))


REWRITES = (
    (rf"\b({'|'.join(COMMANDS)})\.(?=\w)", ""),
    (r'Parser key "config": ', ""),
    (r'Parser key "([\w.]+)":\s*', r"--\1: "),
    (r"Group '([\w.]+)' does not accept option '", r"unknown option '\1."),
    (r"Subcommand '\w+' does not accept option", "unknown option"),
    (r"Option ('[\w.]+') is not accepted", r"unknown option \1"),
    (r"unrecognized arguments:", "unknown option"),
    (r"following arguments are required", "following options are required"),
    (r"(?s)Does not validate against any of the Union subtypes.*?- (.*?)\n.*Given value:", r"\1. Got value:"),
    (r"Expected an? <class '(\w+)'>", r"expected \1"),
    (r"Expected a typing\.Literal", "expected one of "),
    (r"\. Got value:", ", got"),
)
"""Patterns in jsonargparse's messages, and how the same is said in the words of the command line."""


def explain(message: str, parser: ArgumentParser) -> str:
    """Return jsonargparse's message in the words of the command line, with the nearest valid option added."""
    for pattern, replacement in REWRITES:
        message = re.sub(pattern, replacement, message)
    if found := re.search(r"unknown option '?(?:--)?([\w.-]+)", message):
        message += nearest(f"--{found[1]}", (option for action in parser._actions for option in action.option_strings))
    if found := re.search(r"invalid choice: '([^']*)'", message):
        message = f"unknown command {found[1]!r}, known are {', '.join(COMMANDS)}{nearest(found[1], COMMANDS)}"
    return message


def fail(program: str, message: str) -> NoReturn:
    """Print one error message and exit with code 2."""
    sys.stderr.write(f"{program}: error: {message.strip()}\n")
    raise SystemExit(USER_ERROR)


def _interrupted(state: str) -> int:
    sys.stderr.write(f"interrupted{state}\n")
    return INTERRUPTED
