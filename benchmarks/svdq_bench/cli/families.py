"""``svdq eval families``: which of transformers' model families can use the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import CsvFile, HtmlFile, JsonFile, Markdown
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report


@reports_errors
def families(
    *,
    family: Annotated[
        list[str] | None, typer.Option(help="A model type of transformers; repeatable.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Every n-th of all families.")] = 1,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
    markdown: Markdown = False,
) -> None:
    """Whether each family of causal language models works with the cache, and how.

    A small random model of each generates with exact keys, which must give the tokens of a
    DynamicCache, and with packed ones, whose decoded keys must be the model's own.
    """
    from svdq_bench.quality.families import evaluate_families
    from svdq_bench.quality.families import families as known

    names = family or sorted(known())[::every]
    with quiet_transformers(), step_progress(len(names)) as begin:
        rows = evaluate_families(names, begin)
    report(rows, json_file, markdown, "families of causal language models", csv_file, html_file)
