"""Tables of result rows for the terminal and in Markdown, and ``svdq table``: from JSON to them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.formats import bits as _bits
from svdq_bench.cli.formats import budget as _budget
from svdq_bench.cli.formats import fine_percent as _fine_percent
from svdq_bench.cli.formats import megabytes as _megabytes
from svdq_bench.cli.formats import number as _number
from svdq_bench.cli.formats import percent as _percent
from svdq_bench.cli.formats import points as _points
from svdq_bench.cli.formats import times as _times

PLAIN_WIDTH = 160


# Per benchmark: key of a row, heading, how to write it. Keys that no row has are left out.
COLUMNS: dict[str, list[tuple[str, str, Callable[[Any], str]]]] = {
    "perplexity": [
        ("method", "keys", str),
        ("k_bits", "bits", _bits),
        ("all_in_bits", "bits, all in", _bits),
        ("v_bits", "value bits", str),
        ("sink_tokens", "sinks", str),
        ("budget", "budget", _budget),
        ("code_read_ratio", "key codes read, times fewer", _number(1)),
        ("read_ratio", "all in", _number(1)),
        ("perplexity", "perplexity", _number(3)),
        ("kl", "KL", _number(4)),
        ("top1_agreement", "same top token", _percent),
    ],
    "retrieval": [
        ("method", "keys", str),
        ("k_bits", "bits", _bits),
        ("all_in_bits", "bits, all in", _bits),
        ("budget", "budget", _budget),
        ("code_read_ratio", "key codes read, times fewer", _number(1)),
        ("read_ratio", "all in", _number(1)),
    ],
    "sparsity": [
        ("method", "tokens chosen by", str),
        ("scan_bytes", "bytes to score a token", _number(1)),
    ],
    "harness": [
        ("method", "keys", str),
        ("task", "task", str),
        ("metric", "metric", str),
        ("value", "value", _number(4)),
        ("stderr", "standard error", _number(4)),
        ("all_in_bits", "bits, all in", _bits),
        ("compressed", "contexts compressed", "{:,}".format),
        ("too_short", "too short", "{:,}".format),
    ],
    "key_error": [
        ("method", "keys", str),
        ("number", "no.", str),
        ("bits", "bits", _bits),
        ("all_in_bits", "bits, all in", _bits),
        ("relative_error", "relative error", _number(4)),
        ("ratio_min", "times smaller: least", _number(1)),
        ("ratio_median", "median", _number(1)),
        ("ratio_mean", "mean", _number(1)),
        ("score_ratio_median", "of scores, median", _number(1)),
    ],
    "attend": [
        ("case", "case", str),
        ("kv_len", "tokens", "{:,}".format),
        ("k_bits", "key bits", _bits),
        ("v_bits", "value bits", _bits),
        ("ms", "ms (median)", _number(2)),
        ("best_ms", "ms (best)", _number(2)),
        ("ns_per_token", "ns a token and KV head", _number(1)),
        ("speedup_vs_torch_best", "against torch's best", _times),
        ("speedup_vs_enable_gqa", "against enable_gqa", _times),
        ("speedup_vs_ggml_f16", "against ggml f16", _times),
        ("speedup_vs_ggml_q4_0", "ggml q4_0", _times),
        ("bytes", "MB read", _megabytes),
        ("gbytes_per_s", "GB/s", _number(1)),
        ("bandwidth_fraction", "of memory bandwidth", _percent),
        ("bandwidth_fraction_same_size", "of a cached buffer's", _percent),
    ],
    "generate": [
        ("case", "cache", str),
        ("dtype", "numbers", str),
        ("ttft_ms", "first token, ms", _number(0)),
        ("ttft_vs_full", "of DynamicCache's", _percent),
        ("decode_ms", "ms a token", _number(1)),
        ("tokens_per_second", "tokens/s", _number(1)),
        ("speedup_vs_full", "against DynamicCache", _times),
        ("cache_bytes", "cache, all in, MB", _megabytes),
        ("cache_ratio", "times smaller", _number(1)),
    ],
    "sparse": [
        ("case", "case", str),
        ("kv_len", "tokens", "{:,}".format),
        ("attended", "attended", "{:,}".format),
        ("ms", "ms (median)", _number(2)),
        ("select_ms", "select", _number(2)),
        ("gather_ms", "gather", _number(2)),
        ("attend_ms", "attend", _number(2)),
        ("speedup_vs_dense", "against all tokens", _times),
        ("speedup_vs_torch_best", "against torch's best", _times),
        ("speedup_vs_enable_gqa", "against enable_gqa", _times),
        ("code_read_ratio", "key codes read, times fewer", _number(1)),
        ("read_ratio", "all in", _number(1)),
    ],
    "fit": [
        ("case", "step", str),
        ("ms", "ms (median)", _number(2)),
        ("best_ms", "ms (best)", _number(2)),
        ("gflops", "GFLOP/s", _number(0)),
        ("speedup_vs_svd", "against torch.linalg.svd", _times),
        ("keys_gbytes_per_s", "GB/s of keys", _number(1)),
        ("bandwidth_fraction", "of reading them", _percent),
        ("fraction_of_prefill", "of the layer's prefill", _fine_percent),
        ("peak_fraction", "memory added, of the layer's full cache", _percent),
    ],
    "prefill": [
        ("case", "step", str),
        ("tokens", "tokens", "{:,}".format),
        ("ms", "ms (median)", _number(1)),
        ("fraction_of_prefill", "of the prefill", _percent),
    ],
    "demo": [
        ("method", "cache", str),
        ("perplexity", "perplexity", _number(3)),
        ("kl", "KL", _number(4)),
        ("top1_agreement", "same top token", _percent),
        ("cache_bytes", "keys and values, all in, MB", _megabytes),
        ("cache_ratio", "times smaller", _number(2)),
        ("all_in_bits", "bits a key number", _bits),
        ("prefill_seconds", "prefill, s", _number(2)),
        ("decode_ms", "ms a token", _number(1)),
        ("tokens_per_second", "tokens/s", _number(1)),
    ],
}

TRANSPOSED = {"demo"}


def cells(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Headings and formatted cells of rows of one benchmark; empty where a row lacks a value.

    Rows that are only drawn are left out, those of retrieval and of errors of keys summarized. For
    the benchmarks of ``TRANSPOSED`` each row of results becomes a column.
    """
    from svdq_bench.quality.summary import DRAWN_ONLY, summarize_key_errors

    rows = [row for row in rows if row.get("benchmark") not in DRAWN_ONLY]
    if not rows or rows[0].get("benchmark") not in COLUMNS:
        raise ValueError(f"expected rows with benchmark one of {sorted(COLUMNS)}")
    benchmark = rows[0]["benchmark"]
    columns = COLUMNS[benchmark]
    if benchmark == "retrieval":
        rows, pooled = _retrieval_columns(rows)
        columns = columns + pooled
    elif benchmark == "sparsity":
        rows, budgets = _recall_columns(rows)
        columns = columns + budgets
    elif benchmark == "key_error":
        rows = summarize_key_errors(rows)
    columns = [c for c in columns if any(c[0] in row for row in rows)]
    body = [
        ["" if row.get(key) is None else write(row[key]) for key, _, write in columns]
        for row in rows
    ]
    headings = [heading for _, heading, _ in columns]
    if benchmark in TRANSPOSED:
        headings, *body = map(list, zip(headings, *body, strict=True))
    return headings, body


def _retrieval_columns(rows: Sequence[dict]) -> tuple[list[dict], list]:
    """A row a method, and the columns of its accuracies by task and by length of context."""
    from svdq_bench.quality.summary import summarize

    summary = summarize(rows)
    keys = list(dict.fromkeys(key for row in summary for key in row))
    columns = []
    for key in keys:
        kind, _, name = key.partition(": ")
        if kind == "task":  # in words, so that a heading can wrap
            columns.append((key, name.replace("_", " "), _percent))
    columns.append(("able", "all that the model can do", _percent))
    columns.append(("able_difference", "points to the full cache", _points))
    columns.append(("able_stderr", "standard error", lambda value: f"{100 * value:.1f}"))
    for key in keys:
        kind, _, name = key.partition(": ")
        if kind == "tokens":
            columns.append((key, f"these at {int(name):,}", _percent))
    return summary, columns


def _recall_columns(rows: Sequence[dict]) -> tuple[list[dict], list]:
    """A row a method, and the columns of its recall by budget."""
    from svdq_bench.quality.summary import summarize_recall

    summary = summarize_recall(rows)
    keys = list(dict.fromkeys(key for row in summary for key in row))
    budgets = [key for key in keys if key.startswith("budget: ")]
    return summary, [(key, key.removeprefix("budget: "), _number(3)) for key in budgets]


def layer_cells(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the ratios of errors of keys: a line a layer, a column a method.

    Methods are named by their numbers in the table of :func:`cells`.
    """
    rows = [row for row in rows if row.get("benchmark") == "key_error"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found: dict[int, dict[str, str]] = {}
    for row in rows:
        ratio = row["ratio"]
        found.setdefault(row["layer"], {})[row["method"]] = "" if ratio is None else f"{ratio:.1f}"
    body = [[str(layer), *(line.get(m, "") for m in methods)] for layer, line in found.items()]
    return ["layer", *(str(i) for i in range(1, len(methods) + 1))], body


def terminal_table(rows: Sequence[dict], title: str | None = None) -> Table:
    """Rows as a table for the terminal."""
    headings, body = cells(rows)
    return _terminal(headings, body, title, rows[0]["benchmark"] in TRANSPOSED)


def layer_table(rows: Sequence[dict], title: str | None = None) -> Table:
    """What :func:`layer_cells` says, for the terminal."""
    return _terminal(*layer_cells(rows), title)


def _terminal(
    headings: list[str], body: list[list[str]], title: str | None, transposed: bool = False
) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, heading in enumerate(headings):
        # Headings may wrap in a narrow terminal, but not inside of words or numbers.
        least = max(map(len, [*heading.split(), *(row[index] for row in body)]))
        if index == 0 or transposed:
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        else:
            table.add_column(heading, justify="right", min_width=least)
    for row in body:
        table.add_row(*row)
    return table


def markdown_table(rows: Sequence[dict], by_layer: bool = False) -> str:
    """Rows as a Markdown table, no line twice, with the machines they were taken on below it.

    Parameters
    ----------
    by_layer : the table of :func:`layer_cells` instead of that of :func:`cells`.
    """
    headings, body = layer_cells(rows) if by_layer else cells(rows)
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
        full cache). Blocks ``<!-- layers: NAME -->`` take errors of keys layer by layer.
    results : rows by name. Blocks that need others stay as they are.

    Raises
    ------
    ValueError
        If some of the results are in no block.
    """
    unused = set(results)

    def fill(found: re.Match) -> str:
        names = found["names"].split()
        if not set(names) <= set(results):
            return found[0]
        unused.difference_update(names)
        rows = [row for name in names for row in results[name]]
        table = markdown_table(rows, by_layer=found["kind"] == "layers")
        return f"{found['begin']}\n{table}\n{found['end']}"

    begin = r"(?P<begin><!-- (?P<kind>table|layers):(?P<names>[^>]*)-->)"
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
            "without .json.",
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
    # There are many rows that are only drawn, and others beside them that name the machine.
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
