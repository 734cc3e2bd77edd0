"""One-line messages and exit code 2 for what the user can put right."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import typer
from rich.console import Console

Command = TypeVar("Command", bound=Callable)

USER_ERRORS = (ValueError, OSError, ImportError, NotImplementedError)
EXIT_CODE = 2

show_traceback = False


def reports_errors(command: Command) -> Command:
    """Turn an error about the user's input into ``svdq: error: ...`` on stderr and exit code 2.

    Other exceptions are faults of the program and keep their traceback, as all do with
    ``svdq --traceback``.
    """

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except USER_ERRORS as error:
            if show_traceback:
                traceback.print_exc(file=sys.stderr)
            message = " ".join(str(error).split()) or type(error).__name__
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            console.print("[bold red]svdq: error:[/]", end=" ")
            console.print(message, markup=False)
            raise typer.Exit(EXIT_CODE) from error

    return wrapped
