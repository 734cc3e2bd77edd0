"""Tables of result rows for the terminal and in Markdown, and ``svdq table``: from JSON to them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from svdq_bench.cli.columns import TRANSPOSED, cells, layer_cells
from svdq_bench.cli.errors import reports_errors

PLAIN_WIDTH = 200


def terminal_table(rows: Sequence[dict], title: str | None = None) -> Table:
    """Rows as a table for the terminal."""
    headings, body = cells(rows)
    return _terminal(headings, body, title, rows[0]["benchmark"] in TRANSPOSED)


def layer_table(rows: Sequence[dict], title: str | None = None) -> Table:
    """The table of :func:`layer_cells`, for the terminal."""
    return _terminal(*layer_cells(rows), title)


def _terminal(
    headings: list[str], body: list[list[str]], title: str | None, transposed: bool = False
) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, heading in enumerate(headings):
        # Headings may wrap in a narrow terminal, but not inside of words or numbers.
        min_width = max(map(len, [*heading.split(), *(row[index] for row in body)]))
        if index == 0 or transposed:
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        else:
            table.add_column(heading, justify="right", min_width=min_width)
    for row in body:
        table.add_row(*row)
    return table


def markdown_table(
    rows: Sequence[dict], by_layer: bool = False, keys: Sequence[str] | None = None
) -> str:
    """Rows as a Markdown table, no line twice, with the machines they were taken on below it.

    Parameters
    ----------
    by_layer : the table of :func:`layer_cells` instead of that of :func:`cells`.
    keys : the columns, as for :func:`cells`.
    """
    headings, body = layer_cells(rows) if by_layer else cells(rows, keys)
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    lines = [f"| {' | '.join(row)} |" for row in (headings, rule, *body)]
    lines = list(dict.fromkeys(lines))
    machines = dict.fromkeys(machine_line(row["machine"]) for row in rows if row.get("machine"))
    if machines:
        lines += ["", *machines]
    return "\n".join(lines)


def machine_line(machine: dict) -> str:
    """One line that says where numbers come from."""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, backend {machine['backend']}, "
        f"svdq {machine['svdq']}, torch {machine['torch']}, transformers {machine['transformers']}."
    )


def write_json(path: Path, rows: Sequence[dict]) -> None:
    """Write rows as a JSON list, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> list[dict]:
    """Read rows that :func:`write_json` wrote."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of rows")
    return rows


def fill_tables(text: str, results: dict[str, list[dict]]) -> str:
    """Bring the tables of a document up to date.

    Parameters
    ----------
    text : Markdown with blocks ``<!-- table: NAME ... -->``, old table, ``<!-- end -->``. A block
        of several names shows the rows of all of them, leaving out what would be written twice (the
        full cache). ``<!-- table: NAME ... (KEY ...) -->`` shows the columns of these keys of a row
        alone, in this order. Blocks ``<!-- layers: NAME -->`` take errors of keys layer by layer.
    results : rows by name. Blocks that need others stay as they are.

    Raises
    ------
    ValueError
        If some of the results are in no block, or a block asks for a column that its table lacks.
    """
    unused = set(results)

    def fill(found: re.Match) -> str:
        names = found["names"].split()
        if not set(names) <= set(results):
            return found[0]
        unused.difference_update(names)
        rows = [row for name in names for row in results[name]]
        keys = found["keys"].split() if found["keys"] else None
        table = markdown_table(rows, by_layer=found["kind"] == "layers", keys=keys)
        return f"{found['begin']}\n{table}\n{found['end']}"

    columns = r"(?:\((?P<keys>[^>)]*)\) )?"
    begin = rf"(?P<begin><!-- (?P<kind>table|layers):(?P<names>[^>(]*){columns}-->)"
    pattern = begin + r"\n.*?(?P<end><!-- end -->)"
    text = re.sub(pattern, fill, text, flags=re.DOTALL)
    if unused:
        raise ValueError(f"no block '<!-- table: {min(unused)} -->' ... '<!-- end -->' to fill")
    return text


@reports_errors
def table(
    files: Annotated[list[Path], typer.Argument(help="JSON files that --json wrote.")],
    into: Annotated[
        Path | None,
        typer.Option(
            help="Fill this document's blocks '<!-- table: NAME -->', NAME being a file's name "
            "without .json; '<!-- table: NAME (KEY ...) -->' takes some columns alone.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the files' rows of one kind, the first row's, to this SVG file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print results as Markdown tables, bring a document's tables up to date, or draw them."""
    results = {file.stem: read_json(file) for file in files}
    if plot is not None:
        from svdq_bench.quality.report import write_plot

        write_plot(plot, [row for rows in results.values() for row in rows])
    elif into is None:
        typer.echo("\n\n".join(markdown_table(rows) for rows in results.values()))
    if into is not None:
        text = into.read_text(encoding="utf-8")
        into.write_text(fill_tables(text, results), encoding="utf-8")


def report(
    rows: list[dict],
    json_file: Path | None,
    markdown: bool,
    title: str | None = None,
    csv_file: Path | None = None,
    html_file: Path | None = None,
) -> list[dict]:
    """Print rows and write them to files if asked; the rows with the machine in each."""
    from svdq_bench.quality.summary import DRAWN_ONLY
    from svdq_bench.speed import machine

    facts = machine.describe()
    # There are many rows that are only drawn, and others next to them that name the machine.
    rows = [row if row["benchmark"] in DRAWN_ONLY else row | {"machine": facts} for row in rows]
    if markdown:
        typer.echo(markdown_table(rows))
    else:
        # A pipe or a file has no width to fit into; a terminal has.
        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        console.print(terminal_table(rows, title))
        console.print(machine_line(facts), style="dim", highlight=False)
    if json_file is not None:
        write_json(json_file, rows)
    if csv_file is not None:
        from svdq_bench.quality.report import write_csv

        write_csv(csv_file, rows)
    if html_file is not None:
        from svdq_bench.quality.report import write_html

        write_html(html_file, rows, title or rows[0]["benchmark"])
    return rows
