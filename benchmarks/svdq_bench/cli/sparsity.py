"""``svdq eval sparsity``: how much of the attention do the chosen tokens hold?"""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    CACHE_PANEL,
    MODEL_PANEL,
    SPARSE_PANEL,
    Clip,
    CsvFile,
    Dtype,
    GgufFile,
    HtmlFile,
    JsonFile,
    KeyBits,
    Markdown,
    Model,
    ModelDtype,
    Rope,
    ScorerName,
    SinkTokens,
    TextFile,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report


@reports_errors
def sparsity(
    *,
    budget: Annotated[
        list[str],
        typer.Option(
            help="Tokens of a KV head to choose, or their share of the context; repeatable.",
            rich_help_panel=SPARSE_PANEL,
        ),
    ] = ["1/4", "1/8", "1/16", "1/32", "1/64"],  # noqa: B006  (typer reads it, nothing mutates it)
    scorer: Annotated[
        list[ScorerName],
        typer.Option(
            help="Leading channels of the codes, or mean keys of chunks; repeatable.",
            rich_help_panel=SPARSE_PANEL,
        ),
    ] = [ScorerName.latent, ScorerName.landmarks],  # noqa: B006
    channels: Annotated[
        list[int],
        typer.Option(
            help="Leading channels that score, a multiple of 4 up to 32; repeatable.",
            rich_help_panel=SPARSE_PANEL,
        ),
    ] = [4, 8, 16],  # noqa: B006
    preset: KeyBits = "paper-1.25",
    weighted: Annotated[
        bool,
        typer.Option(
            "--weighted/--no-weighted",
            help="Fit bases in units of attention score.",
            rich_help_panel=CACHE_PANEL,
        ),
    ] = True,
    rope: Annotated[
        list[Rope],
        typer.Option(help="Where keys are coded; repeatable.", rich_help_panel=CACHE_PANEL),
    ] = [Rope.pre],  # noqa: B006
    clip: Clip = True,
    sink_tokens: SinkTokens = 8,
    residual_length: Annotated[
        int,
        typer.Option(
            min=1, help="Last tokens that are read in any case.", rich_help_panel=CACHE_PANEL
        ),
    ] = 64,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    context_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that are packed.", rich_help_panel=MODEL_PANEL)
    ] = 6144,
    start: Annotated[
        int, typer.Option(min=0, help="First of them in the text.", rich_help_panel=MODEL_PANEL)
    ] = 5000,
    last: Annotated[
        int,
        typer.Option(
            min=1, help="Last tokens that queries are taken from.", rich_help_panel=MODEL_PANEL
        ),
    ] = 1000,
    every: Annotated[
        int,
        typer.Option(min=1, help="Every so many of them is one.", rich_help_panel=MODEL_PANEL),
    ] = 30,
    dtype: ModelDtype = Dtype.float32,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
    markdown: Markdown = False,
) -> None:
    """Share of the true attention mass that scorers find, against what is possible.

    A context is prefilled exactly and all its keys are packed. Then late queries of it choose among
    the tokens before their window. Mass is the softmax probability under the exact keys, mean over
    queries, heads and layers.
    """
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.budgets import parse_budget
    from svdq_bench.quality.recall import RecallTask, evaluate_recall, make_scorers

    budgets = [parse_budget(text) for text in budget]
    scorers = make_scorers(
        [one.value for one in scorer],
        channels,
        [one.value for one in rope],
        keys=preset,
        query_weighted=weighted,
        clip=clip,
        sink_tokens=sink_tokens,
    )
    task = RecallTask(start, context_tokens, last, every, sink_tokens, residual_length)
    text = texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    with quiet_transformers():
        token_ids = models.tokenize(models.load_tokenizer(source), text)
        task.context(token_ids)  # what does not fit is said before the model is loaded
        loaded = models.load_model(source, models.DTYPES[dtype.value])
    with step_progress(2 + len(scorers)) as begin:
        rows = evaluate_recall(loaded, token_ids, scorers, budgets, task, begin)
    for row in rows:
        row["model"] = str(source)
    title = f"{source}, {dtype.value}, {context_tokens:,} tokens: attention mass that is read"
    report(rows, json_file, markdown, title, csv_file, html_file)
