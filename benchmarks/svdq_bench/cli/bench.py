"""``svdq bench``: speed, always in the same run as what it is compared with."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_bench.cli import first_token, fit, generate, sparse, steps
from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    CACHE_PANEL,
    MODEL_PANEL,
    SHAPE_PANEL,
    VALUE_BITS,
    Clip,
    CodedWhere,
    Dtype,
    GgufFile,
    HeadDim,
    JsonFile,
    KeyBits,
    KvHeads,
    KvLens,
    Markdown,
    Model,
    ModelDtype,
    QoHeads,
    Rope,
    Ropes,
    RopeTheta,
    Rounds,
    ShapeModel,
    SinkTokens,
    TextFile,
    Window,
    WorkingSet,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report

app = typer.Typer(
    help="Measure speed against torch and the model, in one run.", no_args_is_help=True
)


@app.command()
@reports_errors
def attend(
    *,
    rope: Ropes = [Rope.post, Rope.pre],  # noqa: B006  (typer reads it, nothing mutates it)
    preset: KeyBits = "paper-1.25",
    v_bits: Annotated[
        list[int],
        typer.Option(help="Bits per value: 4, 3 or 2; repeatable.", rich_help_panel=CACHE_PANEL),
    ] = [4],  # noqa: B006
    sink_tokens: SinkTokens = 8,
    residual_length: Window = 64,
    kv_len: KvLens = [32768],  # noqa: B006
    model_shape: ShapeModel = None,
    num_qo_heads: QoHeads = 32,
    num_kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    rope_theta: RopeTheta = 5e5,
    dtype: Annotated[
        list[Dtype],
        typer.Option(help="Number formats; repeatable.", rich_help_panel=SHAPE_PANEL),
    ] = [Dtype.bfloat16, Dtype.float32],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, help="Sequences.", rich_help_panel=SHAPE_PANEL)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=SHAPE_PANEL)] = "cpu",
    repeats: Rounds = 30,
    working_set: WorkingSet = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time one decode step over packed pages, against torch's attention in bfloat16 and float32.

    On a GPU (--device cuda) steps are replayed from CUDA graphs, and FlashInfer and flash-attn are
    timed too where they are installed, or FlashDecoding in Triton.
    """
    from svdq_bench.quality.methods import parse_schedule
    from svdq_bench.quality.models import DTYPES
    from svdq_bench.speed import ggml
    from svdq_bench.speed.attend import Variants, bench_attend
    from svdq_bench.speed.gpu import check_device
    from svdq_bench.speed.models import model_shape as find_shape
    from svdq_bench.speed.shape import Shape, page_layout
    from svdq_bench.speed.timing import WARMUP

    schedule = parse_schedule(preset)
    if schedule is None:
        raise ValueError(f"bench attend times packed keys; {preset!r} packs nothing")
    for bits in v_bits:
        if bits not in VALUE_BITS:
            raise ValueError(f"v_bits must be 4, 3 or 2, got {bits}")
    if model_shape is not None:
        model = find_shape(model_shape)
        num_qo_heads, num_kv_heads = model.num_qo_heads, model.num_kv_heads
        head_dim, rope_theta = model.head_dim, model.rope_theta
    heads = (num_qo_heads, num_kv_heads, head_dim)
    exact = (sink_tokens, residual_length)
    shapes = [Shape(*heads, n, *exact, rope_theta, batch) for n in kv_len]
    dtypes = [DTYPES[each.value] for each in dtype]
    for shape in shapes:
        page_layout(shape, schedule, rope[0].value, v_bits[0])  # says early what pages cannot hold
    check_device(device)
    if device == "cpu" and ggml.missing():
        typer.echo(ggml.missing(), err=True)
    bytes_asked = None if working_set is None else working_set * 1_000_000
    variants = Variants(schedule, [mode.value for mode in rope], v_bits, dtypes)
    rows = []
    with step_progress(len(shapes) * (1 + WARMUP + repeats)) as begin:
        for shape in shapes:
            rows += bench_attend(shape, variants, repeats, bytes_asked, begin, device)
    title = f"one decode step, {num_qo_heads} query / {num_kv_heads} KV heads of {head_dim}"
    report(rows, json_file, markdown, title)


@app.command()
@reports_errors
def prefill(
    *,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to prefill.", rich_help_panel=MODEL_PANEL)
    ] = 8192,
    preset: KeyBits = "paper-1.25",
    rope: CodedWhere = Rope.pre,
    v_bits: Annotated[
        int, typer.Option(help="Bits per value, 4 or 2.", rich_help_panel=CACHE_PANEL)
    ] = 4,
    clip: Clip = True,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: TextFile = None,
    dtype: ModelDtype = Dtype.bfloat16,
    repeats: Annotated[int, typer.Option(min=1, help="Prefills and compressions to time.")] = 3,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time fitting and packing a prompt's keys and values, against the model's prefill of it."""
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.methods import parse_schedule
    from svdq_bench.speed.prefill import bench_prefill

    schedule = parse_schedule(preset)
    if schedule is None:
        raise ValueError(f"bench prefill times packing; {preset!r} packs nothing")
    text = texts.load_text(text_file)
    source = models.find_model(model, gguf_file)
    with quiet_transformers():
        token_ids = models.tokenize(models.load_tokenizer(source), text)
        if len(token_ids) < tokens:
            raise ValueError(f"the text has {len(token_ids)} tokens, {tokens} are asked for")
        loaded = models.load_model(source, models.DTYPES[dtype.value])
    with step_progress(2 * repeats) as begin:
        rows = bench_prefill(
            loaded, token_ids[:tokens], schedule, rope.value, v_bits, clip, repeats, begin
        )
    for row in rows:
        row["model"] = str(source)
    report(rows, json_file, markdown, title=f"{source}, {dtype.value}")


app.command()(sparse.sparse)
app.command()(steps.steps)
app.command("first-token")(first_token.first_token)
app.command()(fit.fit)
app.command()(generate.generate)
