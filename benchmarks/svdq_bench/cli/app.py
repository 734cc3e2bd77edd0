"""The command's tree: demo, calibrate, eval, bench, table, info."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli import bench, calibrate, demo, errors, evaluate, info, table

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


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error about your input arose.")
    ] = False,
) -> None:
    """Options that come before the command's name."""
    errors.show_traceback = traceback


def main() -> None:
    """Entry point of the ``svdq`` script."""
    app()
