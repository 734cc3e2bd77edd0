"""``svdq eval memory``: what a cache takes, part by part, at several lengths of a context."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.methods import make_methods
from svdq_bench.cli.options import (
    MODEL_PANEL,
    Averages,
    CodedWhere,
    CsvFile,
    Dtype,
    GgufFile,
    HtmlFile,
    JointAverages,
    JsonFile,
    KeptExact,
    Markdown,
    Model,
    ModelDtype,
    Presets,
    Rope,
    SinkTokens,
    TextFile,
    ValueBits,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report


@reports_errors
def memory(
    *,
    preset: Presets = None,
    k_bits: Averages = None,
    kv_bits: JointAverages = None,
    v_bits: ValueBits = "4",
    rope: CodedWhere = Rope.pre,
    sink_tokens: SinkTokens = 8,
    residual_length: KeptExact = 64,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    tokens: Annotated[
        list[int],
        typer.Option(min=1, help="Tokens of a context; repeatable.", rich_help_panel=MODEL_PANEL),
    ] = [1024, 4096, 8192, 32768],  # noqa: B006  (typer reads it, nothing mutates it)
    window_start: Annotated[
        int, typer.Option(help="First token of the contexts.", rich_help_panel=MODEL_PANEL)
    ] = 5000,
    dtype: ModelDtype = Dtype.bfloat16,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
    markdown: Markdown = False,
) -> None:
    """Bits of a number of keys and of values, by part, right after contexts of several lengths.

    Codes, bases with scales and means, exact tokens. Contexts longer than the model can read are
    computed from the pages of the longest that it can. Without settings: the default cache.
    """
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.footprint import evaluate_memory

    if not (preset or k_bits or kv_bits):
        from svdq.config.presets import KV_BITS

        kv_bits = [KV_BITS]
    methods = make_methods(
        preset,
        [],
        v_bits=v_bits,
        rope=rope,
        clip=True,
        sink_tokens=sink_tokens,
        residual_length=residual_length,
        averages=k_bits,
        joint=kv_bits,
    )
    text = texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    with quiet_transformers():
        token_ids = models.tokenize(models.load_tokenizer(source), text)
        loaded = models.load_model(source, models.DTYPES[dtype.value])
    with step_progress(len(tokens) * len(methods)) as begin:
        rows = evaluate_memory(loaded, token_ids, methods, tokens, window_start, begin)
    for row in rows:
        row |= {"model": str(source), "text": texts.name_of(text_file)}
    report(rows, json_file, markdown, f"{source}, {dtype.value}", csv_file, html_file)
