"""``svdq bench sparse``: a decode step that attends to the best tokens alone."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq.cli.errors import reports_errors
from svdq.cli.options import (
    CACHE_PANEL,
    SHAPE_PANEL,
    SPARSE_PANEL,
    JsonFile,
    KeyBits,
    Markdown,
    Rope,
    SinkTokens,
    SparseChannels,
    WorkingSet,
)
from svdq.cli.progress import step_progress
from svdq.cli.table import report


@reports_errors
def sparse(
    budget: Annotated[
        list[str],
        typer.Option(
            help="Packed tokens to attend to, or their share; repeatable.",
            rich_help_panel=SPARSE_PANEL,
        ),
    ] = ["1/32", "2048"],  # noqa: B006  (typer reads it, nothing mutates it)
    sparse_channels: SparseChannels = 16,
    rope: Annotated[
        list[Rope],
        typer.Option(help="Where keys are coded; repeatable.", rich_help_panel=CACHE_PANEL),
    ] = [Rope.post, Rope.pre],  # noqa: B006
    preset: KeyBits = "paper-1.25",
    v_bits: Annotated[
        int, typer.Option(help="Bits per value, 4 or 2.", rich_help_panel=CACHE_PANEL)
    ] = 4,
    sink_tokens: SinkTokens = 8,
    residual_length: Annotated[
        int, typer.Option(min=0, help="Last tokens that stay exact.", rich_help_panel=CACHE_PANEL)
    ] = 64,
    kv_len: Annotated[
        list[int],
        typer.Option(help="Tokens in the cache; repeatable.", rich_help_panel=SHAPE_PANEL),
    ] = [4096, 16384, 32768, 65536, 131072, 262144],  # noqa: B006
    num_qo_heads: Annotated[
        int, typer.Option(min=1, help="Query heads.", rich_help_panel=SHAPE_PANEL)
    ] = 32,
    num_kv_heads: Annotated[
        int, typer.Option(min=1, help="KV heads.", rich_help_panel=SHAPE_PANEL)
    ] = 8,
    head_dim: Annotated[
        int, typer.Option(min=16, help="Numbers of a head.", rich_help_panel=SHAPE_PANEL)
    ] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of all cases.")] = 15,
    working_set: WorkingSet = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time one decode step with a budget of packed tokens, beside all of them and beside torch.

    Pages hold random codes, whose best tokens lie anywhere: the worst case for memory. The columns
    select, gather and attend split the step, in calls apart from the timed ones.
    """
    from svdq.benchmark.attend import Shape, page_layout
    from svdq.benchmark.sparse import bench_sparse
    from svdq.benchmark.timing import WARMUP
    from svdq.evaluation.budgets import parse_budget
    from svdq.evaluation.methods import parse_schedule
    from svdq.sparsity import Sparsity

    budgets = [parse_budget(text) for text in budget]
    schedule = parse_schedule(preset)
    if schedule is None:
        raise ValueError(f"bench sparse times packed keys; {preset!r} packs nothing")
    if v_bits not in (2, 4):
        raise ValueError(f"v_bits must be 2 or 4, got {v_bits}")
    shapes = [
        Shape(num_qo_heads, num_kv_heads, head_dim, n, sink_tokens, residual_length) for n in kv_len
    ]
    # What cannot be is said before anything slow happens.
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
                ropes,
                v_bits,
                sparse_channels,
                repeats,
                bytes_asked,
                begin,
            )
    title = f"one decode step, {num_qo_heads} query / {num_kv_heads} KV heads of {head_dim}"
    report(rows, json_file, markdown, title)
