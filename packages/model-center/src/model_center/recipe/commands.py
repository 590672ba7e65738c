"""What the commands share: which errors are the user's to mend, interruption, and the lines at a run's end."""

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

OK, USER_ERROR, INTERRUPTED = 0, 2, 130
"""Exit codes: done, something that the user can mend, stopped by a signal."""


class UserError(Exception):
    """An error whose message is all that the user needs; the command prints it without a traceback."""


class RunInterrupted(KeyboardInterrupt):
    """The end of a run that a signal has asked for, and that can be resumed; the message says after which step."""


def is_first_process() -> bool:
    """Whether this is the one of several processes that speaks, as a launcher such as torchrun tells it."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def preparing(console: Console, doing: str) -> Iterator[None]:
    """Show what goes on while input is read and checked, and make its errors the user's.

    Args:
        console: where it is shown.
        doing: what goes on, e.g. `Loading model and data`.

    Raises:
        UserError: something that the user named is missing, broken or does not fit.
    """
    try:
        with console.status(doing):
            yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted before {doing.lower()} was done; nothing was written") from error


def error_of_run(error: Exception, how_to_go_on: str) -> UserError:
    """Return what is told of an error that ended a run; if that was a full disk, with what to do then."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"{error}; make room there, then {how_to_go_on}")
        cause = cause.__cause__
    return UserError(str(error))


def say_interrupted(message: str) -> int:
    """Print why the command ends early, in one of several processes, and return the exit code that says so."""
    if is_first_process():
        sys.stderr.write(f"{message}\n")
    return INTERRUPTED


def print_lines(console: Console, lines: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    for name, value in lines.items():
        console.print(f"{name:<13} {value}", highlight=False, soft_wrap=True)
