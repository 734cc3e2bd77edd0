"""``svdq eval retrieval``: does a model still find what is in a compressed context?"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.methods import make_methods, with_budgets
from svdq_bench.cli.options import (
    CACHE_PANEL,
    DEFAULT_CHANNELS,
    SPARSE_PANEL,
    Across,
    AllocateAcross,
    Averages,
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
    Peers,
    Presets,
    Prices,
    Rope,
    ScorerName,
    SinkTokens,
    SparseBudgets,
    SparseChannels,
    SparseScorers,
    TextFile,
    Weighted,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report

TASK_PANEL = "Questions"


class Haystack(str, enum.Enum):
    """The text that needles are hidden in."""

    text = "text"
    noise = "noise"


@reports_errors
def retrieval(
    *,
    preset: Presets = None,
    k_bits: Averages = None,
    kv_bits: JointAverages = None,
    price: Prices = None,
    allocate_across: AllocateAcross = Across.model,
    weighted: Weighted = None,
    peer: Peers = [],  # noqa: B006  (typer reads it, nothing mutates it)
    clip: Clip = True,
    rope: CodedWhere = Rope.pre,
    v_bits: Annotated[
        list[str],
        typer.Option(
            help="Bits per value: 4, 3, 2 or between, 'exact' as the model computes them; "
            "repeatable. Caches with --kv-bits say their own.",
            rich_help_panel=CACHE_PANEL,
        ),
    ] = ["exact"],  # noqa: B006
    sink_tokens: SinkTokens = 8,
    residual_length: KeptExact = 0,
    sparse_budget: SparseBudgets = None,
    sparse_scorer: SparseScorers = [ScorerName.latent],  # noqa: B006
    sparse_channels: SparseChannels = DEFAULT_CHANNELS,
    dense_layers: DenseLayers = 0,
    sparse_question: Annotated[
        bool,
        typer.Option(
            "--sparse-question/--dense-question",
            help="With a budget, feed the question one token at a time, or at once as generate() "
            "does, so that it sees all tokens.",
            rich_help_panel=SPARSE_PANEL,
        ),
    ] = True,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="niah_single, niah_multikey, niah_multivalue, variable_tracking, common_words; "
            "repeatable. Default: all.",
            rich_help_panel=TASK_PANEL,
            show_default=False,
        ),
    ] = None,
    context_tokens: Annotated[
        list[int],
        typer.Option(min=1, help="Length of a context; repeatable.", rich_help_panel=TASK_PANEL),
    ] = [1024, 2048, 4096],  # noqa: B006
    depth: Annotated[
        list[float],
        typer.Option(
            min=0,
            max=1,
            help="Where a needle is hidden, 0 (front) to 1 (end); repeatable. The needles of "
            "several questions are spread instead.",
            rich_help_panel=TASK_PANEL,
        ),
    ] = [0.0, 0.25, 0.5, 0.75, 1.0],  # noqa: B006
    samples: Annotated[
        int,
        typer.Option(
            min=1, help="Contexts of a task, length and depth.", rich_help_panel=TASK_PANEL
        ),
    ] = 4,
    questions: Annotated[
        int,
        typer.Option(
            min=1,
            help="Questions about each context, each asked on its own; common_words has one.",
            rich_help_panel=TASK_PANEL,
        ),
    ] = 1,
    decode: Annotated[
        bool,
        typer.Option(
            help="Decode all answers and search them for the expected strings. Default: only "
            "where the order of the strings is open.",
            rich_help_panel=TASK_PANEL,
            show_default=False,
        ),
    ] = False,
    seed: Annotated[
        str, typer.Option(help="Other seeds, other questions.", rich_help_panel=TASK_PANEL)
    ] = "0",
    haystack: Annotated[
        Haystack,
        typer.Option(
            help="Hide needles in the text, or in repeated sentences.", rich_help_panel=TASK_PANEL
        ),
    ] = Haystack.text,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    dtype: ModelDtype = Dtype.float32,
    device: ModelDevice = "cpu",
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
    markdown: Markdown = False,
) -> None:
    """Questions about a long context that was compressed before they came, against the full cache.

    Every context is prefilled exactly, once for all methods, and compressed; then comes each
    question with its right answer. Scores are the answer's log-likelihood and probability, and the
    share of the expected strings that greedy decoding gives. With --sparse-budget svdq caches take
    questions one token at a time, too, since only such steps are sparse, unless --dense-question is
    given.
    """
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.methods import CacheSettings
    from svdq_bench.quality.puzzles import TASKS
    from svdq_bench.quality.retrieval import Sweep, evaluate_retrieval
    from svdq_bench.quality.tasks import NOISE, SampleMaker
    from svdq_bench.speed.gpu import check_device, device_columns

    given = preset or k_bits or price  # keys without bits of values
    methods = []  # one for each key setting and value bits, peers once
    for number, bits in enumerate(v_bits if given else v_bits[:1]):
        methods += make_methods(
            preset,
            [] if number else peer,
            v_bits=bits,
            rope=rope,
            clip=clip,
            sink_tokens=sink_tokens,
            residual_length=residual_length,
            averages=k_bits,
            joint=None if number else kv_bits,
            prices=price,
            across=allocate_across,
            weighted=weighted,
        )
    methods = with_budgets(methods, sparse_budget, sparse_scorer, sparse_channels, dense_layers)
    if not sparse_question:
        methods = [
            replace(one, one_by_one=False) if isinstance(one, CacheSettings) else one
            for one in methods
        ]
    tasks = tuple(task or TASKS)
    sweep = Sweep(tasks, tuple(context_tokens), tuple(depth), samples, seed, questions)
    text = NOISE if haystack is Haystack.noise else texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    check_device(device)
    with quiet_transformers():
        tokenizer = models.load_tokenizer(source)
        contexts = sweep.make_samples(SampleMaker(tokenizer, text))
        loaded = models.load_model(source, models.DTYPES[dtype.value]).to(device)
    with step_progress(samples * len(contexts)) as begin:
        rows = evaluate_retrieval(loaded, tokenizer, methods, contexts, begin, decode)
    for row in rows:
        row |= {"model": str(source), "haystack": haystack.value, "seed": seed}
        row |= device_columns(device)
        if haystack is Haystack.text:
            row["text"] = texts.name_of(text_file)
        if sparse_budget:
            row["sparse_question"] = sparse_question
    title = f"{source}, {dtype.value}, retrieval"
    report(rows, json_file, markdown, title, csv_file, html_file)
