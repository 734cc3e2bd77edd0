"""``svdq bench fit``: fitting and packing a prompt, without a model."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    SHAPE_PANEL,
    VALUE_BITS,
    Dtype,
    JsonFile,
    KeyBits,
    Markdown,
    PackedValueBits,
    Rope,
    Ropes,
    Rounds,
)
from svdq_bench.cli.progress import step_progress
from svdq_bench.cli.table import report


@reports_errors
def fit(
    *,
    model_shape: Annotated[
        str,
        typer.Option(
            help="Model whose layer it is: llama-3.1-8b, qwen2.5-7b, gemma-3-4b or smollm2-135m.",
            rich_help_panel=SHAPE_PANEL,
        ),
    ] = "llama-3.1-8b",
    num_kv_heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Key heads, if not the model's.",
            rich_help_panel=SHAPE_PANEL,
            show_default=False,
        ),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Size of a head, if not the model's.",
            rich_help_panel=SHAPE_PANEL,
            show_default=False,
        ),
    ] = None,
    kv_len: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt.", rich_help_panel=SHAPE_PANEL)
    ] = 32768,
    rope: Ropes = [Rope.post, Rope.pre, Rope.hybrid],  # noqa: B006  (typer reads it)
    schedule: KeyBits = "paper-1.25",
    v_bits: PackedValueBits = 4,
    dtype: Annotated[
        Dtype, typer.Option(help="Number format of keys and values.", rich_help_panel=SHAPE_PANEL)
    ] = Dtype.bfloat16,
    repeats: Rounds = 7,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time fitting and packing a layer's synthetic keys, against their decomposition in torch.

    The share of the prefill is that of a layer's operations at the rate of torch's matrix products
    in the same run.
    """
    from dataclasses import replace

    import torch

    from svdq_bench.quality.methods import parse_schedule
    from svdq_bench.speed.fit import bench_fit
    from svdq_bench.speed.models import model_shape as find_shape
    from svdq_bench.speed.shape import Shape, page_layout
    from svdq_bench.speed.timing import WARMUP

    bits = parse_schedule(schedule)
    if bits is None:
        raise ValueError(f"bench fit times packing; {schedule!r} packs nothing")
    if v_bits not in VALUE_BITS:
        raise ValueError(f"v_bits must be 4, 3 or 2, got {v_bits}")
    shape = find_shape(model_shape)
    shape = replace(
        shape,
        num_kv_heads=num_kv_heads or shape.num_kv_heads,
        head_dim=head_dim or shape.head_dim,
    )
    ropes = [mode.value for mode in rope]
    heads = shape.num_kv_heads
    # Says early what pages cannot hold.
    page_layout(Shape(heads, heads, shape.head_dim, kv_len + 1, 0, 0), bits, ropes[0], v_bits)
    with step_progress(1 + WARMUP + repeats + len(ropes)) as begin:
        rows = bench_fit(
            shape,
            kv_len,
            bits,
            ropes,
            v_bits=v_bits,
            dtype=getattr(torch, dtype.value),
            repeats=repeats,
            begin=begin,
        )
    rows = [row | {"model": model_shape} for row in rows]
    title = f"one layer of {model_shape}, {heads} KV heads of {shape.head_dim}, {kv_len:,} tokens"
    report(rows, json_file, markdown, title)
