"""Progress bars on stderr, so that stdout holds results alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

# The command shows its own bars alone. Libraries draw theirs with tqdm, which reads this when it
# is imported; no library is imported before a command runs.
os.environ.setdefault("TQDM_DISABLE", "1")


def new_progress() -> Progress:
    """A progress display in this command's style."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def step_progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show one bar of ``total`` steps; call what it gives with each step's name as it begins."""
    with new_progress() as progress:
        task = progress.add_task("starting", total=total)
        begun = 0

        def begin(step: str) -> None:
            nonlocal begun
            progress.update(task, completed=begun, description=step)
            begun += 1

        yield begin
        progress.update(task, completed=total, description="done")


@contextmanager
def phase_progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Show a bar for each phase of a job: the function it gives begins one and returns its step."""
    with new_progress() as progress:

        def begin(name: str, total: int) -> Callable[[], None]:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        yield begin


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Leave out transformers' notes and its progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
