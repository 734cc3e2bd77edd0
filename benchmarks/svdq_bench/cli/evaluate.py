"""``svdq eval``: what compression does to a model's predictions."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli import calibration, families, harness, keys, memory, retrieval, sparsity
from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.methods import NO_SVDQ, calibrated_method, make_methods, with_budgets
from svdq_bench.cli.options import (
    DEFAULT_CHANNELS,
    MODEL_PANEL,
    Across,
    AllocateAcross,
    Averages,
    CalibrationFile,
    Clip,
    CodedWhere,
    CsvFile,
    DenseLayers,
    Dtype,
    GgufFile,
    HtmlFile,
    JointAverages,
    JsonFile,
    KeptExact,
    Markdown,
    Model,
    ModelDevice,
    ModelDtype,
    OutlierFraction,
    Peers,
    Presets,
    Prices,
    ProfileFile,
    Rope,
    ScorerName,
    SinkTokens,
    SparseBudgets,
    SparseChannels,
    SparseScorers,
    TextFile,
    ValueBits,
    Weighted,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report

app = typer.Typer(
    help="Measure what compression does to a model's predictions.", no_args_is_help=True
)


@app.callback()
def group() -> None:
    """Measure what compression does to a model's predictions."""


@app.command()
@reports_errors
def perplexity(
    *,
    preset: Presets = None,
    k_bits: Averages = None,
    kv_bits: JointAverages = None,
    price: Prices = None,
    allocate_across: AllocateAcross = Across.model,
    weighted: Weighted = None,
    profile: ProfileFile = None,
    calibration: CalibrationFile = None,
    outlier_fraction: OutlierFraction = 0.0,
    peer: Peers = [],  # noqa: B006  (typer reads it, nothing mutates it)
    clip: Clip = True,
    rope: CodedWhere = Rope.pre,
    v_bits: ValueBits = "exact",
    sink_tokens: SinkTokens = 8,
    residual_length: KeptExact = 0,
    sparse_budget: SparseBudgets = None,
    sparse_scorer: SparseScorers = [ScorerName.latent],  # noqa: B006
    sparse_channels: SparseChannels = DEFAULT_CHANNELS,
    dense_layers: DenseLayers = 0,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    prefill_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of a window that are compressed.", rich_help_panel=MODEL_PANEL
        ),
    ] = 3072,
    predict_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens after them to predict.", rich_help_panel=MODEL_PANEL),
    ] = 1024,
    window_start: Annotated[
        list[int],
        typer.Option(help="First token of a window; repeatable.", rich_help_panel=MODEL_PANEL),
    ] = [5000, 40000],  # noqa: B006
    dtype: ModelDtype = Dtype.float32,
    device: ModelDevice = "cpu",
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
    markdown: Markdown = False,
) -> None:
    """Perplexity and KL divergence of text whose past is compressed, against the full cache.

    Of every window the first tokens are prefilled exactly and their keys compressed; the next ones
    are predicted in one forward pass that sees the former through the cache and one another
    exactly. With --sparse-budget all svdq caches are fed one token at a time instead, since only
    such steps are sparse, and pack what leaves their window.
    """
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.perplexity import Task, evaluate_perplexity
    from svdq_bench.speed.gpu import check_device, device_columns

    if calibration is not None and not (preset or k_bits or kv_bits or price):
        preset = [NO_SVDQ]
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
        profile=profile,
        outlier_fraction=outlier_fraction,
    )
    if calibration is not None:
        methods.append(calibrated_method(calibration, sink_tokens, residual_length))
    methods = with_budgets(methods, sparse_budget, sparse_scorer, sparse_channels, dense_layers)
    task = Task(tuple(window_start), prefill_tokens, predict_tokens)
    text = texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    check_device(device)
    with quiet_transformers():
        token_ids = models.tokenize(models.load_tokenizer(source), text)
        task.windows(token_ids)  # a window that does not fit is said before the model is loaded
        loaded = models.load_model(source, models.DTYPES[dtype.value]).to(device)
    steps = len(task.window_starts) * (1 + len(methods))
    with step_progress(steps) as begin:
        rows = evaluate_perplexity(loaded, token_ids, methods, task, begin)
    for row in rows:
        row |= {"model": str(source), "text": texts.name_of(text_file)} | device_columns(device)
    title = f"{source}, {dtype.value}"
    report(rows, json_file, markdown, title, csv_file, html_file)


app.command()(calibration.calibration)
app.command()(keys.keys)
app.command()(memory.memory)
app.command()(families.families)
app.command()(retrieval.retrieval)
app.command()(sparsity.sparsity)
app.command()(harness.harness)
