"""``svdq calibrate``: what a model's keys are like, for allocations that any prompt can use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    CACHE_PANEL,
    MODEL_PANEL,
    CodedWhere,
    Dtype,
    GgufFile,
    Model,
    ModelDtype,
    Rope,
    SinkTokens,
    TextFile,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress


@reports_errors
def calibrate(
    *,
    out: Annotated[Path, typer.Argument(help="Profile to write, a safetensors file.")],
    rope: CodedWhere = Rope.pre,
    core_channels: Annotated[
        int,
        typer.Option(
            min=8, help="Un-rotated channels of --rope hybrid.", rich_help_panel=CACHE_PANEL
        ),
    ] = 8,
    weighted: Annotated[
        bool,
        typer.Option(
            "--weighted/--no-weighted",
            help="Fit bases in units of attention score.",
            rich_help_panel=CACHE_PANEL,
        ),
    ] = True,
    sink_tokens: SinkTokens = 8,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    prompt_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of a prompt.", rich_help_panel=MODEL_PANEL),
    ] = 3072,
    prompt_start: Annotated[
        list[int],
        typer.Option(help="First token of a prompt; repeatable.", rich_help_panel=MODEL_PANEL),
    ] = [60000, 80000],  # noqa: B006  (typer reads it, nothing mutates it)
    dtype: ModelDtype = Dtype.float32,
) -> None:
    """Measure the spectra of a model's keys on text, in units of attention score.

    ``SVDqCache(profile=FILE, k_bits=...)`` and ``svdq eval --profile FILE`` allocate bits by them:
    every prompt then has pages of the same size, known before it is read.
    """
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.calibrate import measure_profile
    from svdq_bench.quality.perplexity import Task

    task = Task(tuple(prompt_start), prompt_tokens, 1)
    text = texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    with quiet_transformers():
        token_ids = models.tokenize(models.load_tokenizer(source), text)
        windows = [window[:, :prompt_tokens] for window in task.windows(token_ids)]
        loaded = models.load_model(source, models.DTYPES[dtype.value])
    with step_progress(len(windows)) as begin:
        profile = measure_profile(
            loaded, windows, rope.value, core_channels, weighted, sink_tokens, begin
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    profile.save(out)
    typer.echo(f"{out}: {len(profile.spectra)} layers of {source}, {len(windows)} prompts")
