"""``svdq bench steps``: what it costs to pack a page, against a step that packs none."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    SHAPE_PANEL,
    Dtype,
    HeadDim,
    JsonFile,
    KeyBits,
    KvHeads,
    Markdown,
    PackedValueBits,
    QoHeads,
    Rope,
    Ropes,
)
from svdq_bench.cli.progress import step_progress
from svdq_bench.cli.table import report


@reports_errors
def steps(
    *,
    rope: Ropes = [Rope.post, Rope.pre],  # noqa: B006  (typer reads it, nothing mutates it)
    preset: KeyBits = "paper-1.25",
    v_bits: PackedValueBits = 4,
    kv_len: Annotated[
        int, typer.Option(min=1, help="Tokens of a sequence.", rich_help_panel=SHAPE_PANEL)
    ] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.", rich_help_panel=SHAPE_PANEL)] = 16,
    num_qo_heads: QoHeads = 32,
    num_kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    dtype: Annotated[
        Dtype, typer.Option(help="Number format of keys and values.", rich_help_panel=SHAPE_PANEL)
    ] = Dtype.bfloat16,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time a layer's decode steps in a row: those in which every sequence packs a page, and others.

    All sequences have one length, so that their pages are full in the same step.
    """
    from svdq.config.settings import Settings
    from svdq_bench.quality.methods import key_argument
    from svdq_bench.quality.models import DTYPES
    from svdq_bench.speed.shape import Shape
    from svdq_bench.speed.steps import bench_steps

    shape = Shape(num_qo_heads, num_kv_heads, head_dim, kv_len, batch=batch)
    keys, rows = key_argument(preset), []
    every = [Settings.of(**keys, v_bits=v_bits, rope=mode.value) for mode in rope]
    if any(settings.allocates or not settings.packs for settings in every):
        raise ValueError(f"bench steps needs a preset or a schedule that packs, got {preset!r}")
    with step_progress(2 * len(every)) as begin:
        for settings in every:
            rows += bench_steps(shape, settings, DTYPES[dtype.value], begin)
    report(rows, json_file, markdown, f"steps of one layer, {batch} sequences of {kv_len:,} tokens")
