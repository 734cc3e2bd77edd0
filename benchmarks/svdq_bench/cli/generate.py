"""``svdq bench generate``: a whole model, prefill and decoding, against transformers' caches."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    MODEL_PANEL,
    Clip,
    Dtype,
    GgufFile,
    JsonFile,
    KeyBits,
    Markdown,
    Model,
    PackedValueBits,
    Rope,
    Ropes,
    TextFile,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report


@reports_errors
def generate(
    *,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt.", rich_help_panel=MODEL_PANEL)
    ] = 8128,
    new_tokens: Annotated[
        int, typer.Option(min=16, help="Tokens to decode.", rich_help_panel=MODEL_PANEL)
    ] = 64,
    preset: KeyBits = "paper-1.25",
    rope: Ropes = [Rope.post, Rope.hybrid, Rope.pre],  # noqa: B006  (typer reads it)
    v_bits: PackedValueBits = 4,
    clip: Clip = True,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    dtype: Annotated[
        list[Dtype],
        typer.Option(help="Number formats of the model; repeatable.", rich_help_panel=MODEL_PANEL),
    ] = [Dtype.bfloat16, Dtype.float32],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Prefills of every cache.")] = 1,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time prefill and decode steps of a model with svdq, against transformers' own caches."""
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.methods import CacheSettings
    from svdq_bench.speed import generate as benchmark

    settings = [CacheSettings(preset, v_bits, rope=mode.value, clip=clip) for mode in rope]
    text = texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    with quiet_transformers():
        token_ids = models.tokenize(models.load_tokenizer(source), text)
    if len(token_ids) < tokens:
        raise ValueError(f"the text has {len(token_ids)} tokens, {tokens} are asked for")
    if benchmark.quantized_backend() is None:
        packages = " or ".join(benchmark.QUANTIZED_BACKENDS)
        typer.echo(f"QuantizedCache is left out: neither {packages} is installed.", err=True)
    rows = []
    for each in dtype:
        with quiet_transformers():
            loaded = models.load_model(source, models.DTYPES[each.value])
        caches = len(benchmark.contenders(loaded, settings))
        with step_progress(caches * (repeats + new_tokens // benchmark.BLOCK_TOKENS)) as begin:
            rows += benchmark.bench_generate(
                loaded, token_ids[:tokens], settings, new_tokens, repeats, begin
            )
        del loaded
    for row in rows:
        row["model"] = str(source)
    report(rows, json_file, markdown, title=f"{source}, {tokens:,} tokens of prompt")
