"""``svdq demo``: a model answers a long prompt with the full cache and with svdq, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    CACHE_PANEL,
    MODEL_PANEL,
    OUTPUT_PANEL,
    Clip,
    CodedWhere,
    Dtype,
    GgufFile,
    KeyBits,
    Model,
    Rope,
    SinkTokens,
    ValueBits,
)
from svdq_bench.cli.progress import phase_progress, quiet_transformers
from svdq_bench.cli.table import report, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from svdq_bench.quality.demo import Run

CURVE_POINTS = 33


@reports_errors
def demo(
    *,
    model: Model = None,
    gguf_file: GgufFile = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text of the prompt. Default: CPython's reference text, pydoc_data.topics.",
            rich_help_panel=MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            help="Asked about the text. Default: what it is about.",
            rich_help_panel=MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the text to read.", rich_help_panel=MODEL_PANEL)
    ] = 4500,
    held_back_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens after them to predict.", rich_help_panel=MODEL_PANEL)
    ] = 512,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate.", rich_help_panel=MODEL_PANEL)
    ] = 64,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Number format of the model and the full cache. Default: bfloat16 or float32, "
            "whichever the full cache is faster in.",
            rich_help_panel=MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    k_bits: KeyBits = "kv=2.5",
    v_bits: ValueBits = "4",
    rope: CodedWhere = Rope.pre,
    clip: Clip = True,
    sink_tokens: SinkTokens = 8,
    residual_length: Annotated[
        int, typer.Option(min=0, help="Last tokens that stay exact.", rich_help_panel=CACHE_PANEL)
    ] = 64,
    output_dir: Annotated[
        Path,
        typer.Option(help="Folder for demo.png and demo.json.", rich_help_panel=OUTPUT_PANEL),
    ] = Path("svdq-demo"),
) -> None:
    """Read a long text and answer, with the full cache and with svdq, in one run.

    Shows quality on held-back text, bytes, speed and both answers; writes a picture and all
    numbers.
    """
    from svdq_bench.quality import demo as run
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.methods import CacheSettings

    settings = CacheSettings(k_bits, v_bits, rope.value, clip, sink_tokens, residual_length)
    if not settings.packs:
        raise ValueError(f"the demo shows packed keys; {k_bits!r} packs nothing")
    run.check_new_tokens(new_tokens)
    if question is None:
        question = run.QUESTION if prompt_file else run.DEFAULT_TEXT_QUESTION
    text = texts.load_text(prompt_file)
    source = models.find_model(model, gguf_file)
    output_dir.mkdir(parents=True, exist_ok=True)
    console = Console()
    if dtype is None:
        dtype, reason = choose_dtype()
        console.print(f"numbers are {dtype.value}: {reason}", highlight=False)
    with quiet_transformers(), phase_progress() as begin:
        step = begin("load the model", 1)
        tokenizer = models.load_tokenizer(source)
        text_ids = models.tokenize(tokenizer, text)
        prompt = run.make_prompt(tokenizer, text_ids, prompt_tokens, held_back_tokens, question)
        loaded = models.load_model(source, models.DTYPES[dtype.value])
        step()
        rows, full, compressed = run.run_demo(
            loaded, tokenizer, prompt, settings, new_tokens, begin
        )
    for row in rows:
        row["model"] = str(source)
    for row in rows:
        console.print(Panel(Text(row["text"].strip()), title=row["method"]))
    title = f"{source}, {dtype.value}, prompt of {prompt.num_tokens:,} tokens"
    rows = report(rows, None, markdown=False, title=title)
    write_json(output_dir / "demo.json", rows)
    draw_picture(output_dir / "demo.png", loaded.config, full, compressed, rows, title)
    console.print(
        f"wrote {output_dir / 'demo.json'} and {output_dir / 'demo.png'}", highlight=False
    )


def choose_dtype() -> tuple[Dtype, str]:
    """The number format in which the full cache is faster on this machine, and why.

    A processor may multiply matrices faster in bfloat16 and yet attend with one query far slower,
    which would flatter svdq.
    """
    from svdq_bench.speed.layer_step import layer_step_ms

    times = {dtype: layer_step_ms(dtype.value) for dtype in (Dtype.bfloat16, Dtype.float32)}
    words = ", ".join(f"{ms:.2f} ms in {dtype.value}" for dtype, ms in times.items())
    return min(times, key=times.get), f"a step of a small layer and its full cache takes {words}"


def draw_picture(
    path: Path, config: PretrainedConfig, full: Run, compressed: Run, rows: list[dict], title: str
) -> None:
    """Draw the demo's picture from what both runs left behind."""
    from svdq_bench.quality import figure, memory, models

    tokens = rows[0]["cached_tokens"]
    longest = min(models.max_tokens(config) or tokens, 2 * tokens)
    lengths = [longest * (i + 1) // CURVE_POINTS for i in range(CURVE_POINTS)]
    curves = figure.MemoryCurves(
        lengths,
        [memory.full_cache_bytes(full.cache, n) for n in lengths],
        [memory.svdq_cache_bytes(compressed.cache, n) for n in lengths],
        (tokens, rows[1]["cache_bytes"]),
    )
    variances, bits = spectrum(full, compressed)
    figure.draw(path, variances, bits, curves, rows, title)


def spectrum(full: Run, compressed: Run) -> tuple[Tensor, Tensor]:
    """Channel variances of all compressed heads, and the bits of each channel: both [N, D]."""
    import torch

    from svdq import ops
    from svdq.cache.layer import SVDqLayer
    from svdq.layout import WIDTHS

    variances, bits = [], []
    for layer, packed_layer in zip(full.cache.layers, compressed.cache.layers, strict=True):
        if not isinstance(packed_layer, SVDqLayer):
            continue
        store = packed_layer.tokens.packed
        sinks = packed_layer.settings.sink_tokens
        _, _, variance = ops.fit_basis(layer.keys[0, :, sinks:], store.codec.inv_freq, sinks)
        variances.append(variance)
        for head in store.layout.bands:
            widths = [w for n, w in zip(head, WIDTHS, strict=True) for _ in range(n)]
            bits.append(widths + [0] * (store.layout.head_dim - len(widths)))
    return torch.cat(variances), torch.tensor(bits)
