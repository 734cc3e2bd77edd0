"""``svdq eval harness``: lm-evaluation-harness's tasks with compressed contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.methods import make_methods
from svdq_bench.cli.options import (
    Across,
    AllocateAcross,
    Averages,
    Clip,
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
    Peers,
    Presets,
    Prices,
    Rope,
    SinkTokens,
    ValueBits,
    Weighted,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report

TASK_PANEL = "Tasks"


@reports_errors
def harness(
    *,
    task: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            help="Names of tasks, separated by commas; repeatable.",
            rich_help_panel=TASK_PANEL,
        ),
    ],
    include_path: Annotated[
        Path | None,
        typer.Option(
            help="Folder with more tasks as YAML files.",
            rich_help_panel=TASK_PANEL,
            show_default=False,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Examples in a context. Default: the task's own.",
            rich_help_panel=TASK_PANEL,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Documents of a task. Default: all.",
            rich_help_panel=TASK_PANEL,
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put contexts into the model's chat template.",
            rich_help_panel=TASK_PANEL,
        ),
    ] = False,
    allow_short: Annotated[
        bool,
        typer.Option(
            "--allow-short",
            help="Leave contexts exact that are too short to compress, and count them; without "
            "this they are an error.",
            rich_help_panel=TASK_PANEL,
        ),
    ] = False,
    preset: Presets = None,
    k_bits: Averages = None,
    kv_bits: JointAverages = None,
    price: Prices = None,
    allocate_across: AllocateAcross = Across.model,
    weighted: Weighted = None,
    peer: Peers = [],  # noqa: B006  (typer reads it, nothing mutates it)
    clip: Clip = True,
    rope: CodedWhere = Rope.pre,
    v_bits: ValueBits = "exact",
    sink_tokens: SinkTokens = 8,
    residual_length: KeptExact = 0,
    model: Model = None,
    gguf_file: GgufFile = None,
    dtype: ModelDtype = Dtype.float32,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
    markdown: Markdown = False,
) -> None:
    """Tasks of lm-evaluation-harness, contexts compressed, against the full cache.

    Needs the package lm_eval ('pip install svdq\\[harness]'). A context is prefilled exactly and
    compressed; the model goes on from there with each continuation, or generates.
    """
    from svdq_bench.quality import models
    from svdq_bench.quality.harness import evaluate_harness, import_harness

    import_harness()
    methods = make_methods(
        preset,
        peer,
        v_bits=v_bits,
        rope=rope,
        clip=clip,
        sink_tokens=sink_tokens,
        residual_length=residual_length,
        averages=k_bits,
        joint=kv_bits,
        prices=price,
        across=allocate_across,
        weighted=weighted,
    )
    tasks = [name.strip() for names in task for name in names.split(",") if name.strip()]
    if not tasks:
        raise ValueError(f"--tasks names no task, got {','.join(task)!r}")
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"no folder {include_path}")
    source = models.find_model(model, gguf_file)
    with quiet_transformers():
        tokenizer = models.load_tokenizer(source)
        loaded = models.load_model(source, models.DTYPES[dtype.value])
    with step_progress(1 + len(methods)) as begin:
        rows = evaluate_harness(
            loaded,
            tokenizer,
            methods,
            tasks,
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            chat=chat,
            allow_short=allow_short,
            begin=begin,
        )
    for row in rows:
        row |= {"model": str(source), "dtype": dtype.value}
    title = f"{source}, {dtype.value}, lm-evaluation-harness"
    report(rows, json_file, markdown, title, csv_file, html_file)
