"""The `model-center` command: its sub-commands, their options and errors."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console

from . import __version__
from .checkpoint_configuration import ConvertConfig, VerifyConfig
from .commands import USER_ERROR, RunInterrupted, UserError, is_first_process, say_interrupted
from .configuration import ReportConfig, nearest, require
from .finetune_configuration import FinetuneConfig, QuickstartConfig
from .pretrain_configuration import PretrainConfig
from .shipped import preset_names, preset_path


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        options: The dataclass whose fields are its options; their docstrings are the help.
        run: What does it, as `module:function` of this package, so that `--help` need not wait for PyTorch. It is
            called with the options, a console and the flags by name, and returns the exit code. What the user can mend
            it raises as `UserError` (see `commands.preparing`); other errors end in a traceback.
        flags: Options that are not part of the dataclass, as keyword arguments of `add_argument`.
        positional: Fields of the dataclass that are given by position, as keyword arguments of `add_argument`.
        presets: Recipe whose configurations come with the package, for `--preset`.
    """

    options: type[Any]
    run: str
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    positional: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    presets: str | None = None


OVERWRITE = {"overwrite": {"action": "store_true", "help": "Delete an earlier run in the output directory."}}
SMALLEST = "gpt2-tiny-text"
CHOICES_OF_A_RUN = (
    "--preset",
    "--config",
    "--model.name",
    "--data.path",
    "--data.text",
    "--data.tokenizer",
    "--help",
    "-h",
)
COMMANDS = {
    "finetune": Command(FinetuneConfig, "finetuning:run", OVERWRITE, presets="finetune"),
    "quickstart": Command(QuickstartConfig, "quickstart:run", OVERWRITE),
    "pretrain": Command(
        PretrainConfig,
        "pretraining:run",
        flags={
            **OVERWRITE,
            "resume": {
                "choices": ("never", "auto"),
                "default": "never",
                "help": "auto goes on from the newest whole checkpoint of the output directory, if there is one.",
            },
        },
        presets="pretrain",
    ),
    "plan": Command(
        PretrainConfig,
        "planning:run",
        flags={
            "memory": {"type": str, "default": None, "help": "Memory of a GPU, e.g. 80GiB; this machine's by default."},
            "world_size": {"type": int, "default": 1, "help": "How many GPUs train together."},
        },
        presets="pretrain",
    ),
    "convert": Command(
        ConvertConfig,
        "conversion:run",
        positional={
            "source": {"metavar": "SOURCE", "help": "Directory or identifier of the checkpoint."},
            "output": {"metavar": "OUTPUT", "help": "Directory to write, which must not exist."},
        },
    ),
    "verify": Command(
        VerifyConfig,
        "verification:run",
        flags={"json": {"action": "store_true", "help": "Print JSON instead of a table."}},
        positional={"checkpoint": {"metavar": "CHECKPOINT", "help": "Directory of the checkpoint."}},
    ),
    "report": Command(
        ReportConfig,
        "report:run",
        flags={"json": {"action": "store_true", "help": "Print JSON instead of a table."}},
        positional={"runs": {"nargs": "+", "metavar": "RUN", "help": "Run directories."}},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    That is 0, 1 for a difference that `verify` found, 2 for what the user can mend, 130 when interrupted.

    Args:
        arguments: the words after `model-center`; those of the process when not given.
    """
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else arguments
    parsed = parser.parse_args(files_first(with_preset(words)))
    command = COMMANDS[parsed.command]
    console = Console(quiet=not is_first_process())
    try:
        options = parser.instantiate(parsed)[parsed.command].as_dict()
        del options["config"]
        options.pop("preset", None)
        flags = {name: options.pop(name) for name in command.flags}
        config = command.options(**options)
    except ValueError as error:
        fail(f"model-center {parsed.command}", str(error))
    module, _, function = command.run.partition(":")
    try:
        run = getattr(import_module(f".{module}", __package__), function)
        exit_code: int = run(config, console, **flags)
    except UserError as error:
        fail(f"model-center {parsed.command}", str(error))
    except RunInterrupted as interrupt:
        exit_code = say_interrupted(f"{interrupt}; this goes on from there:\n{resuming(words)}")
    except KeyboardInterrupt as interrupt:
        exit_code = say_interrupted(str(interrupt) or "interrupted")
    return exit_code


def build_parser() -> ArgumentParser:
    """Return the parser of the whole command; options and their help come from the configuration's docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="model-center", description="Train language models.", version=__version__)
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        places = [f"{place.upper()}{' ...' * ('nargs' in how)}" for place, how in command.positional.items()]
        words = " ".join([name, *places, "[--config FILE] [--option VALUE ...]"])
        options = Parser(usage=f"model-center {words}", description=command.options.__doc__)
        options.add_argument("--config", action="config", help="YAML file with any of the options below, which win.")
        if command.presets:
            known = ", ".join(preset_names(command.presets))
            described = f"Options that come with the package: {known}. Those of --config and all others win."
            options.add_argument("--preset", help=described)
        for flag, how in command.flags.items():
            options.add_argument(f"--{flag}", **how)
        for place, how in command.positional.items():
            options.add_argument(place, **how)
        options.add_class_arguments(command.options, skip=set(command.positional))
        commands.add_subcommand(name, options, help=(command.options.__doc__ or "").splitlines()[0])
    return parser


def with_preset(arguments: Sequence[str]) -> list[str]:
    """Put the file of a preset before all options; `pretrain` of nothing particular means the smallest one."""
    words = list(arguments)
    if words[:1] == ["pretrain"] and not any(word.partition("=")[0] in CHOICES_OF_A_RUN for word in words):
        words[1:1] = ["--preset", SMALLEST]
    recipe = COMMANDS[words[0]].presets if words and words[0] in COMMANDS else None
    names, others = values_of("--preset", words)
    if recipe is None or not names:
        return words
    try:
        require(len(names) == 1, "--preset", "given once", ", ".join(names))
        path = preset_path(recipe, names[0])
    except ValueError as error:
        fail(f"model-center {words[0]}", str(error))
    return [others[0], f"--config={path}", *others[1:]]


def files_first(arguments: Sequence[str]) -> list[str]:
    """Put all `--config` before the other options, which win over the files wherever they were given."""
    files, others = values_of("--config", arguments)
    return [*others[:1], *(f"--config={file}" for file in files), *others[1:]]


def values_of(option: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the values given to an option, and all other words; an option without a value is left for the parser."""
    values: list[str] = []
    others: list[str] = []
    end = words.index("--") if "--" in words else len(words)
    place = 0
    while place < len(words):
        word, following = words[place], words[place + 1 : end][:1]
        place += 1
        if place <= end and word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
        elif word == option and following and not following[0].startswith("-"):
            values += following
            place += 1
        else:
            others.append(word)
    return values, others


def resuming(arguments: Sequence[str]) -> str:
    """Return the command that goes on with a run, given the words of the one that was interrupted."""
    kept: list[str] = []
    for place, word in enumerate(arguments):
        is_value = place > 0 and arguments[place - 1] == "--resume"
        if not is_value and word.partition("=")[0] not in ("--resume", "--overwrite"):
            kept.append(word)
    program = ["torchrun", "...", "-m", "model_center.recipe"] if "WORLD_SIZE" in os.environ else ["model-center"]
    return shlex.join([*program, *kept, "--resume", "auto"])


class Parser(ArgumentParser):
    """A parser whose errors are one message, with the nearest option for a misspelt one."""

    _reading: str | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # What argparse takes for the short form of an option is most often a misspelt one.
        super().__init__(*arguments, allow_abbrev=False, **options)

    def parse_path(self, cfg_path: str | PathLike[str], *arguments: Any, **options: Any) -> Namespace:
        """Read a configuration file, whose name is put before the errors found in it."""
        self._reading = str(cfg_path)
        parsed: Namespace = super().parse_path(cfg_path, *arguments, **options)
        if (preset := parsed.get("preset")) is not None:  # that of the command line is a file by now (`with_preset`)
            self.error(f"preset must be given on the command line, as --preset {preset}; leave it out of the file")
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
