"""``svdq bench sparse``: a decode step that attends to the best tokens alone."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    DEFAULT_CHANNELS,
    SPARSE_PANEL,
    VALUE_BITS,
    HeadDim,
    JsonFile,
    KeyBits,
    KvHeads,
    KvLens,
    Markdown,
    PackedValueBits,
    QoHeads,
    Rope,
    Ropes,
    Rounds,
    SinkTokens,
    SparseChannels,
    Window,
    WorkingSet,
)
from svdq_bench.cli.progress import step_progress
from svdq_bench.cli.table import report


@reports_errors
def sparse(
    *,
    budget: Annotated[
        list[str],
        typer.Option(
            help="Packed tokens to attend to, or their share; repeatable.",
            rich_help_panel=SPARSE_PANEL,
        ),
    ] = ["1/32", "2048"],  # noqa: B006  (typer reads it, nothing mutates it)
    sparse_channels: SparseChannels = DEFAULT_CHANNELS,
    rope: Ropes = [Rope.post, Rope.pre],  # noqa: B006
    preset: KeyBits = "paper-1.25",
    v_bits: PackedValueBits = 4,
    sink_tokens: SinkTokens = 8,
    residual_length: Window = 64,
    kv_len: KvLens = [4096, 16384, 32768, 65536, 131072, 262144],  # noqa: B006
    num_qo_heads: QoHeads = 32,
    num_kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    repeats: Rounds = 15,
    working_set: WorkingSet = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time one decode step with a budget of packed tokens, against all of them and against torch.

    Pages hold random codes, whose best tokens lie anywhere: the worst case for memory. The columns
    select, gather and attend split the step, in calls apart from the timed ones.
    """
    from svdq.config.sparsity import Sparsity
    from svdq_bench.quality.budgets import parse_budget
    from svdq_bench.quality.methods import parse_schedule
    from svdq_bench.speed.shape import Shape, page_layout
    from svdq_bench.speed.sparse import bench_sparse
    from svdq_bench.speed.timing import WARMUP

    budgets = [parse_budget(text) for text in budget]
    schedule = parse_schedule(preset)
    if schedule is None:
        raise ValueError(f"bench sparse times packed keys; {preset!r} packs nothing")
    if v_bits not in VALUE_BITS:
        raise ValueError(f"v_bits must be 4, 3 or 2, got {v_bits}")
    shapes = [
        Shape(num_qo_heads, num_kv_heads, head_dim, n, sink_tokens, residual_length) for n in kv_len
    ]
    # Wrong settings are refused before anything slow happens.
    page_layout(shapes[0], schedule, rope[0].value, v_bits)
    Sparsity(budgets[0], "latent", sparse_channels)
    bytes_asked = None if working_set is None else working_set * 1_000_000
    ropes = [mode.value for mode in rope]
    rows = []
    with step_progress(len(shapes) * (1 + WARMUP + repeats)) as begin:
        for shape in shapes:
            rows += bench_sparse(
                shape,
                schedule,
                budgets,
                ropes=ropes,
                v_bits=v_bits,
                channels=sparse_channels,
                repeats=repeats,
                working_set_bytes=bytes_asked,
                begin=begin,
            )
    title = f"one decode step, {num_qo_heads} query / {num_kv_heads} KV heads of {head_dim}"
    report(rows, json_file, markdown, title)
