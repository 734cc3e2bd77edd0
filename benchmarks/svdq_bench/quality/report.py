"""Rows of results as a page and as a spreadsheet, each one file that needs no other."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdq_bench.quality.plots import PLOTS, to_svg
from svdq_bench.quality.retrieval_plots import is_drawable
from svdq_bench.quality.summary import (
    DRAWN_ONLY,
    able_tasks,
    summarize,
    summarize_key_errors,
    summarize_recall,
)

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; }
th, td { padding: 0.25em 0.6em; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
p.note { color: #555; }
"""
# Columns that a table of a page leaves out: the same in all rows, said once or long.
HIDDEN = ("benchmark", "machine", "cache_parts", "variances", "window_starts")
# Benchmarks of many rows, summarized, and how.
SUMMARIES = {
    "retrieval": summarize,
    "key_error": summarize_key_errors,
    "sparsity": summarize_recall,
}


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows as comma-separated values, a column for every key that any row has.

    A dictionary becomes a column for each of its keys (``machine.cpu``), a list its JSON text; what
    a row lacks is empty.
    """
    flat = [_flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _flatten(row: dict) -> dict[str, Any]:
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in _flatten(value).items()}
        else:
            flat[key] = json.dumps(value) if isinstance(value, list) else value
    return flat


def write_html(path: Path, rows: Sequence[dict], title: str) -> None:
    """Write a page with the plots and tables that the rows are enough for.

    Parameters
    ----------
    rows : of any benchmarks, mixed; those of :data:`svdq_bench.quality.plots.PLOTS` are drawn, the
        others stand in tables.

    Raises
    ------
    ValueError
        If there are no rows, or some do not say of which benchmark they are.
    """
    if not rows or not all(isinstance(row.get("benchmark"), str) for row in rows):
        raise ValueError("expected at least one row, each with its benchmark")
    found = list(dict.fromkeys(row["benchmark"] for row in rows))
    order = [name for name in PLOTS if name in found]
    order += [name for name in found if name not in PLOTS]
    parts = [_section(name, [row for row in rows if row["benchmark"] == name]) for name in order]
    machine = next((row["machine"] for row in rows if row.get("machine")), None)
    if machine:
        facts = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
        parts.append(f'<p class="note">{html.escape(facts)}</p>')
    body = "\n".join(parts)
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def write_plot(path: Path, rows: Sequence[dict]) -> None:
    """Write the plot of the first row's benchmark as an SVG file.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    benchmark = rows[0].get("benchmark") if rows else None
    own = [row for row in rows if row.get("benchmark") == benchmark]
    if not _drawable(benchmark, own):
        raise ValueError(f"rows of {benchmark!r} are not drawn; expected one of {', '.join(PLOTS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_svg(benchmark, own), encoding="utf-8")


def _drawable(benchmark: str | None, rows: Sequence[dict]) -> bool:
    if benchmark == "retrieval":
        return is_drawable(rows)
    return bool(rows) and benchmark in PLOTS


def _section(benchmark: str, rows: list[dict]) -> str:
    """Heading, plot and table of the rows of one benchmark."""
    heading, _ = PLOTS.get(benchmark, (benchmark, None))
    parts = [f"<h2>{html.escape(heading)}</h2>"]
    if benchmark in SUMMARIES:
        parts.append(html_table(SUMMARIES[benchmark](rows)))
    if benchmark == "retrieval":
        able = ", ".join(sorted(able_tasks(rows))) or "none"
        note = f"Tasks that the model itself can do: {able}."
        parts.append(f'<p class="note">{html.escape(note)}</p>')
    if _drawable(benchmark, rows):
        parts.append(to_svg(benchmark, rows))
    if benchmark not in DRAWN_ONLY:
        table = html_table(rows)
        if benchmark in SUMMARIES:
            table = f"<details><summary>All {len(rows)} rows</summary>\n{table}\n</details>"
        parts.append(table)
    return "\n".join(parts)


def html_table(rows: Sequence[dict]) -> str:
    """Rows as a table, a column for every key that a row has a value for."""
    names = list(dict.fromkeys(key for row in rows for key in row if key not in HIDDEN))
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    # Names come first, whatever order rows hold their keys in.
    names.sort(key=lambda name: name not in ("method", "task", "case"))
    lines = [f"<tr>{''.join(f'<th>{html.escape(_heading(name))}</th>' for name in names)}</tr>"]
    for row in rows:
        written = [html.escape(_write(row.get(name))) for name in names]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in written)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _heading(name: str) -> str:
    return name.removeprefix("task: ").removeprefix("tokens: ").replace("_", " ")


def _write(value: Any) -> str:
    """A value as a cell shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
