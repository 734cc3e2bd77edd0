"""``svdq bench first-token``: prompts with calibrated bases, against bases fitted to each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    MODEL_PANEL,
    Dtype,
    GgufFile,
    JsonFile,
    Markdown,
    Model,
    ModelDtype,
    TextFile,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report


@reports_errors
def first_token(
    *,
    file: Annotated[Path, typer.Argument(help="Bases that 'svdq calibrate --bases' wrote.")],
    tokens: Annotated[
        list[int],
        typer.Option(min=1, help="Tokens of a prompt; repeatable.", rich_help_panel=MODEL_PANEL),
    ] = [256, 1024, 4096],  # noqa: B006  (typer reads it, nothing mutates it)
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    dtype: ModelDtype = Dtype.bfloat16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills of every cache.")] = 5,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time the first token of prompts, and count the bits that they take right after it."""
    from svdq import Calibration
    from svdq_bench.quality import models, texts
    from svdq_bench.speed.first_token import bench_first_token

    found = Calibration.load(file)
    text = texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    with quiet_transformers():
        token_ids = models.tokenize(models.load_tokenizer(source), text)
        loaded = models.load_model(source, models.DTYPES[dtype.value])
    with step_progress(3 * len(tokens) * (repeats + 1)) as begin:
        rows = bench_first_token(loaded, token_ids, found, tokens, repeats, begin)
    for row in rows:
        row |= {"model": str(source), "dtype": dtype.value, "text": texts.name_of(text_file)}
    report(rows, json_file, markdown, f"{source}, {dtype.value}")
