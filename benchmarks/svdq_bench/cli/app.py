"""The command's tree: demo, calibrate, eval, bench, table, info."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli import bench, calibrate, demo, errors, evaluate, info, table
from svdq_bench.speed import machine

app = typer.Typer(
    name="svdq",
    help="An LLM's key cache at about one bit a number: demonstration, evaluation, benchmarks.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.command("table")(table.table)
app.command("info")(info.info)


def show_version(asked: bool) -> None:
    """Print the version and end, if asked to."""
    if asked:
        print(f"svdq {machine.package_version('svdq') or 'not installed as a distribution'}")
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error about your input arose.")
    ] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options that come before the command's name."""
    errors.show_traceback = traceback


def main() -> None:
    """Entry point of the ``svdq`` script."""
    app()
