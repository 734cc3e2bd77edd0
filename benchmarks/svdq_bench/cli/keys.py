"""``svdq eval keys``: how far coded keys are from the model's own, layer by layer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.methods import asked_keys
from svdq_bench.cli.options import (
    CACHE_PANEL,
    MODEL_PANEL,
    Across,
    Averages,
    Clip,
    CsvFile,
    Dtype,
    GgufFile,
    HtmlFile,
    JsonFile,
    Markdown,
    Model,
    ModelDtype,
    Peers,
    Rope,
    SinkTokens,
    TextFile,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import PLAIN_WIDTH, layer_table, report


@reports_errors
def keys(
    *,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset or a schedule of bits (8,4,2,1,1,0,0,0); repeatable. Default: paper-2.0 "
            "and --k-bits 2, unless one of them is given.",
            rich_help_panel=CACHE_PANEL,
            show_default=False,
        ),
    ] = None,
    k_bits: Averages = None,
    rope: Annotated[
        list[Rope],
        typer.Option(
            help="Code keys before or after RoPE; repeatable.", rich_help_panel=CACHE_PANEL
        ),
    ] = [Rope.pre, Rope.post],  # noqa: B006  (typer reads it, nothing mutates it)
    allocate_across: Annotated[
        list[Across],
        typer.Option(
            help="Over what bits to allocate are the average; repeatable.",
            rich_help_panel=CACHE_PANEL,
        ),
    ] = [Across.model, Across.head],  # noqa: B006
    weighted: Annotated[
        bool | None,
        typer.Option(
            "--weighted/--no-weighted",
            help="Fit bases in units of attention score where bits are allocated. Default: both.",
            rich_help_panel=CACHE_PANEL,
            show_default=False,
        ),
    ] = None,
    peer: Peers = ["kivi:2:32"],  # noqa: B006
    clip: Clip = True,
    sink_tokens: SinkTokens = 8,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    prefill_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of a window.", rich_help_panel=MODEL_PANEL),
    ] = 3072,
    window_start: Annotated[
        list[int],
        typer.Option(help="First token of a window; repeatable.", rich_help_panel=MODEL_PANEL),
    ] = [5000, 40000],  # noqa: B006
    dtype: ModelDtype = Dtype.float32,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
    markdown: Markdown = False,
) -> None:
    """Error of coded keys against per-channel quantization to 2 bits, and how small it could be.

    The first tokens of every window are prefilled exactly and their keys coded. Errors are relative
    to the keys' deviation from their mean; 'times smaller' is the error of per-channel quantization
    over a method's, layer by layer.
    """
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.key_error import evaluate_keys, key_methods
    from svdq_bench.quality.matching import parse_peer
    from svdq_bench.quality.methods import CacheSettings
    from svdq_bench.quality.perplexity import Task

    words = asked_keys(preset, k_bits, default=("paper-2.0", "2"))
    reference = CacheSettings(words[0], "exact", rope[0].value, clip, sink_tokens, 0)
    methods = key_methods(
        words,
        [parse_peer(text, reference, sink_tokens) for text in peer],
        [one.value for one in rope],
        [one.value for one in allocate_across],
        [True, False] if weighted is None else [weighted],
        clip,
        sink_tokens,
    )
    task = Task(tuple(window_start), prefill_tokens, predict_tokens=1)
    text = texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    with quiet_transformers():
        token_ids = models.tokenize(models.load_tokenizer(source), text)
        task.windows(token_ids)  # a window that does not fit is said before the model is loaded
        loaded = models.load_model(source, models.DTYPES[dtype.value])
    with step_progress(len(task.window_starts) * len(methods)) as begin:
        rows = evaluate_keys(loaded, token_ids, methods, task, begin)
    for row in rows:
        row["model"] = str(source)
    title = f"{source}, {dtype.value}, {prefill_tokens:,} tokens"
    rows = report(rows, json_file, markdown, title, csv_file, html_file)
    if not markdown:
        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        console.print(layer_table(rows, "times smaller, by layer; columns are the methods above"))
