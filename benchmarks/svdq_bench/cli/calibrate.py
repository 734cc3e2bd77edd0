"""``svdq calibrate``: what a model's keys are like, for caches of any prompt."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdq_bench.cli.errors import reports_errors
from svdq_bench.cli.options import (
    CACHE_PANEL,
    MODEL_PANEL,
    Clip,
    CodedWhere,
    Dtype,
    GgufFile,
    JsonFile,
    Markdown,
    Model,
    ModelDevice,
    ModelDtype,
    Rope,
    SinkTokens,
)
from svdq_bench.cli.progress import quiet_transformers, step_progress
from svdq_bench.cli.table import report

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from svdq_bench.quality.models import ModelSource

BASES_PANEL = "Calibrated bases"


@reports_errors
def calibrate(
    *,
    out: Annotated[
        Path | None,
        typer.Argument(help="Profile to write, a safetensors file.", show_default=False),
    ] = None,
    bases: Annotated[
        Path | None,
        typer.Option(
            help="Write bases, means, ranges and widths to this safetensors file instead.",
            rich_help_panel=BASES_PANEL,
            show_default=False,
        ),
    ] = None,
    k_bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per key number, on average.",
            rich_help_panel=BASES_PANEL,
            show_default=False,
        ),
    ] = None,
    kv_bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per number of keys and values together. Default: 2.5, without --k-bits.",
            rich_help_panel=BASES_PANEL,
            show_default=False,
        ),
    ] = None,
    v_bits: Annotated[
        str | None,
        typer.Option(
            help="Bits per value next to --k-bits. Default: 4.",
            rich_help_panel=BASES_PANEL,
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts of each text to fit; one more is held out.",
            rich_help_panel=BASES_PANEL,
        ),
    ] = 2,
    predict_tokens: Annotated[
        int,
        typer.Option(
            min=2,
            help="Tokens to predict after the prompts that are held out.",
            rich_help_panel=BASES_PANEL,
        ),
    ] = 512,
    clip: Clip = True,
    rope: CodedWhere = Rope.pre,
    core_channels: Annotated[
        int,
        typer.Option(
            min=8, help="Un-rotated channels of --rope hybrid.", rich_help_panel=CACHE_PANEL
        ),
    ] = 8,
    weighted: Annotated[
        bool,
        typer.Option(
            "--weighted/--no-weighted",
            help="Fit bases in units of attention score.",
            rich_help_panel=CACHE_PANEL,
        ),
    ] = True,
    sink_tokens: SinkTokens = 8,
    model: Model = None,
    gguf_file: GgufFile = None,
    text_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--text-file",
            "--text",
            help="UTF-8 text, or one that comes along: topics, docstrings, code, fiction or "
            "history. Repeatable with --bases, where all of these are the default; else topics.",
            rich_help_panel=MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of a prompt.", rich_help_panel=MODEL_PANEL),
    ] = 3072,
    prompt_start: Annotated[
        list[int],
        typer.Option(
            help="First token of a prompt of a profile; repeatable.", rich_help_panel=MODEL_PANEL
        ),
    ] = [60000, 80000],  # noqa: B006  (typer reads it, nothing mutates it)
    dtype: ModelDtype = Dtype.float32,
    device: ModelDevice = "cpu",
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Measure a model's keys on text, once for all prompts.

    A profile has their spectra, in units of attention score: SVDqCache(profile=FILE, k_bits=...)
    and 'svdq eval --profile FILE' allocate bits by them, so every prompt has pages of the same
    size. With --bases everything is fitted: SVDqCache(calibration=FILE) packs prompts as they
    come, and no prompt has bytes of a basis. What that loses on held-out text is printed.
    """
    if (out is None) == (bases is None):
        raise ValueError("give a profile to write, or bases to write with --bases FILE")
    bits = {"--k-bits": k_bits, "--kv-bits": kv_bits, "--v-bits": v_bits}
    use = _Model(model, gguf_file, dtype, device)
    if out is not None:
        for name, value in bits.items():
            if value is not None:
                raise ValueError(f"{name} is for --bases: a profile serves all bits")
        if text_file and len(text_file) > 1:
            raise ValueError(f"a profile is of one text, got {len(text_file)}")
        text = text_file[0] if text_file else None
        settings = rope.value, core_channels, weighted, sink_tokens
        _write_profile(out, use, text, (tuple(prompt_start), prompt_tokens), settings)
        return
    settings = {
        **_asked_bits(k_bits, kv_bits, v_bits),
        "rope": rope.value,
        "pre_channels": core_channels,
        "clip": clip,
        "query_weighted": weighted,
    }
    sizes = windows, prompt_tokens, predict_tokens
    rows = _write_bases(bases, use, text_file, settings, sink_tokens, sizes)
    report(rows, json_file, markdown, f"{rows[0]['model']}, {dtype.value}")


@dataclass(frozen=True)
class _Model:
    """A model that the options name."""

    name: str | None
    gguf_file: str | None
    dtype: Dtype
    device: str

    @functools.cached_property
    def source(self) -> ModelSource:
        from svdq_bench.quality import models

        return models.find_model(self.name, self.gguf_file)

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids [T] of texts."""
        from svdq_bench.quality import models

        with quiet_transformers():
            tokenizer = models.load_tokenizer(self.source)
            return [models.tokenize(tokenizer, text) for text in texts]

    def load(self) -> PreTrainedModel:
        from svdq_bench.quality import models

        with quiet_transformers():
            found = models.load_model(self.source, models.DTYPES[self.dtype.value])
        return found.to(self.device)


def _asked_bits(k_bits: float | None, kv_bits: float | None, v_bits: str | None) -> dict[str, Any]:
    """Keywords of a cache's settings for the bits that the options name."""
    from svdq.config.presets import KV_BITS
    from svdq_bench.quality.methods import parse_value_bits

    if k_bits is None:
        if v_bits is not None:
            raise ValueError("--v-bits goes with --k-bits: --kv-bits says the bits of values too")
        return {"kv_bits": KV_BITS if kv_bits is None else kv_bits}
    if kv_bits is not None:
        raise ValueError("give one of --k-bits and --kv-bits")
    return {"k_bits": k_bits, "v_bits": parse_value_bits(v_bits or "4")}


def _write_profile(
    path: Path,
    use: _Model,
    text_file: Path | None,
    prompts: tuple[tuple[int, ...], int],
    settings: tuple[str, int, bool, int],
) -> None:
    from svdq_bench.quality import texts
    from svdq_bench.quality.calibrate import measure_profile
    from svdq_bench.quality.perplexity import Task
    from svdq_bench.speed.gpu import check_device

    starts, prompt_tokens = prompts
    task = Task(starts, prompt_tokens, 1)
    text = texts.load_text(text_file)
    check_device(use.device)
    windows = [window[:, :prompt_tokens] for window in task.windows(use.tokenize([text])[0])]
    windows = [window.to(use.device) for window in windows]
    with step_progress(len(windows)) as begin:
        profile = measure_profile(use.load(), windows, *settings, begin)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    typer.echo(f"{path}: {len(profile.spectra)} layers of {use.source}, {len(windows)} prompts")


def _write_bases(
    path: Path,
    use: _Model,
    text_files: Sequence[Path] | None,
    settings: dict[str, Any],
    sink_tokens: int,
    sizes: tuple[int, int, int],
) -> list[dict]:
    """Write a calibration; rows of what it loses on held-out text."""
    from svdq.fit.calibration import with_held_out
    from svdq_bench.quality import texts
    from svdq_bench.quality.calibrated_loss import drift_bound, held_out_loss
    from svdq_bench.quality.calibration import calibrate_bases, cut_windows
    from svdq_bench.speed.gpu import check_device

    windows, prompt_tokens, predict_tokens = sizes
    sources = list(text_files or texts.MIXTURE)
    names = [texts.name_of(source) for source in sources]
    check_device(use.device)
    token_ids = use.tokenize([texts.load_text(source) for source in sources])
    cut = [
        cut_windows(name, ids, windows, prompt_tokens, predict_tokens)
        for name, ids in zip(names, token_ids, strict=True)
    ]
    model = use.load()
    with step_progress(len(cut) * (windows + 1) + 1) as begin:
        found = calibrate_bases(model, cut, settings, sink_tokens, begin)
        rows = held_out_loss(model, found, cut, predict_tokens, begin)
    found = with_held_out(found, rows, drift_bound(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    typer.echo(
        f"{path}: {len(found.layers)} layers of {use.source}, {found.num_tokens:,} keys of "
        f"{len(cut)} texts, {path.stat().st_size:,} bytes; a prompt is out of the domain above a "
        f"drift of {found.drift_bound:.2f}"
    )
    return [row | {"model": str(use.source), "dtype": use.dtype.value} for row in rows]
