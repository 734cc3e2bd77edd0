"""``svdq eval calibration``: what calibrated bases cost, against bases of each prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    MODEL_PANEL,
    Dtype,
    GgufFile,
    JsonFile,
    Markdown,
    Model,
    ModelDevice,
    ModelDtype,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report


@reports_errors
def calibration(
    *,
    file: Annotated[Path, typer.Argument(help="Bases that 'svdq calibrate --bases' wrote.")],
    text_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--text-file",
            "--text",
            help="UTF-8 text, or topics (the default), docstrings, code, fiction or history; "
            "repeatable.",
            rich_help_panel=MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        list[int],
        typer.Option(min=1, help="Tokens of a context; repeatable.", rich_help_panel=MODEL_PANEL),
    ] = [1024, 4096, 7168],  # noqa: B006  (typer reads it, nothing mutates it)
    predict_tokens: Annotated[
        int,
        typer.Option(min=2, help="Tokens after them to predict.", rich_help_panel=MODEL_PANEL),
    ] = 1024,
    window_start: Annotated[
        list[int],
        typer.Option(help="First token of a context; repeatable.", rich_help_panel=MODEL_PANEL),
    ] = [5000, 40000],  # noqa: B006
    model: Model = None,
    gguf_file: GgufFile = None,
    dtype: ModelDtype = Dtype.float32,
    device: ModelDevice = "cpu",
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """KL of text whose past is packed with calibrated bases, and with bases fitted to that past.

    Both take as many bits all in: the latter have fewer bits of codes, by what a prompt's own
    basis takes. Also with the calibrated basis and the prompt's own mean and ranges.
    """
    from svdq import Calibration
    from svdq_bench.quality import models, texts
    from svdq_bench.quality.calibrated_loss import cut_contexts, evaluate_calibration
    from svdq_bench.speed.gpu import check_device, device_columns

    found = Calibration.load(file)
    sources = list(text_file or [texts.DEFAULT_TEXT])
    read = {texts.name_of(source): texts.load_text(source) for source in sources}
    source = models.find_model(model, gguf_file)
    check_device(device)
    with quiet_transformers():
        tokenizer = models.load_tokenizer(source)
        contexts = [
            cut_contexts(name, ids, window_start, count, predict_tokens)
            for name, ids in ((x, models.tokenize(tokenizer, text)) for x, text in read.items())
            for count in tokens
        ]
        loaded = models.load_model(source, models.DTYPES[dtype.value]).to(device)
    with step_progress(4 * len(contexts) * len(window_start)) as begin:
        rows = evaluate_calibration(loaded, found, contexts, begin)
    for row in rows:
        row |= {"model": str(source), "dtype": dtype.value, "calibrated_on": list(found.texts)}
        row |= device_columns(device)
    report(rows, json_file, markdown, f"{source}, {dtype.value}")
