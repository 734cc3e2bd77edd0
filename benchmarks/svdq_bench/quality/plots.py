"""The plots of a report, each as SVG text that stands in a page by itself."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from svdq_bench.quality.drawing import (
    MARKERS,
    budget_line,
    budget_scale,
    draw_heat,
    log_scale,
    method_of,
    new_figure,
)
from svdq_bench.quality.perplexity_plots import perplexity_plot
from svdq_bench.quality.retrieval_plots import retrieval_plot

# A page must not depend on the day or on what is installed where it is read: no date, no outlines
# of letters whose names would clash between plots.
SVG_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def to_svg(benchmark: str, rows: Sequence[dict]) -> str:
    """The plot of a benchmark's rows as an ``<svg>`` element, one of each benchmark a page.

    Parameters
    ----------
    benchmark : one of :data:`PLOTS`.
    """
    _, draw = PLOTS[benchmark]
    buffer = io.StringIO()
    with matplotlib.rc_context(SVG_STYLE | {"svg.hashsalt": benchmark}):
        draw(rows).savefig(buffer, format="svg", metadata=NO_METADATA)
    text = buffer.getvalue()
    # Groups are numbered anew in every picture, and ids of a page must differ. No one refers to
    # them; the salt above keeps apart those that are referred to.
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


def recall(rows: Sequence[dict]) -> Figure:
    """Attention mass that is read against the budget, a line for each choice.

    Parameters
    ----------
    rows : of ``"sparsity"``: method, budget, recall.
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        group = [row for row in rows if row["method"] == method]
        budget_line(axes, index, method, group, "recall")
    budget_scale(axes, rows)
    axes.set(ylabel="attention mass that is read")
    axes.legend(fontsize=8)
    return figure


def decode_time(rows: Sequence[dict]) -> Figure:
    """Time of a decode step against the length of the context, a line for each case.

    Parameters
    ----------
    rows : of ``"sparse"``: case, kv_len, ms.
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    for index, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        group = sorted((r for r in rows if r["case"] == case), key=lambda row: row["kv_len"])
        lengths, times = ([row[key] for row in group] for key in ("kv_len", "ms"))
        marker, color = MARKERS[index % len(MARKERS)], f"C{index % 10}"
        axes.plot(lengths, times, f"{marker}-", label=case, color=color, ms=4, lw=1)
    lengths = sorted({row["kv_len"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens in the cache", ylabel="attention of one step, ms")
    log_scale(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def bits_heat(rows: Sequence[dict]) -> Figure:
    """Bits a key number by layer and KV head, a panel for each method.

    Parameters
    ----------
    rows : of ``"bits"``: layer, head, bits; method where there are several.
    """
    layers = sorted({row["layer"] for row in rows})
    heads = sorted({row["head"] for row in rows})
    methods = list(dict.fromkeys(row.get("method") for row in rows))
    height = 1.6 + 0.35 * len(heads)
    figure = new_figure(max(5, 1 + 0.38 * len(layers)), height * len(methods))
    max_bits = max(row["bits"] for row in rows)
    panels = figure.subplots(len(methods), squeeze=False)[:, 0]
    for axes, method in zip(panels, methods, strict=True):
        values = np.full((len(heads), len(layers)), np.nan)
        for row in rows:
            if row.get("method") == method:
                values[heads.index(row["head"]), layers.index(row["layer"])] = row["bits"]
        image = draw_heat(axes, values, 0, max_bits, "viridis", "{:.2g}")
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(range(len(heads)), heads)
        axes.set(xlabel="layer", ylabel="KV head")
        axes.set_title(method, fontsize=9)
    figure.colorbar(image, ax=panels, label="bits")
    return figure


def spectrum(rows: Sequence[dict]) -> Figure:
    """Deviation of the latent channels, a line for each layer, the median of its heads.

    Parameters
    ----------
    rows : of ``"spectrum"``: layer, head, variances (largest first).
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    layers = sorted({row["layer"] for row in rows})
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(layers)))
    for color, layer in zip(colors, layers, strict=True):
        heads = [row["variances"] for row in rows if row["layer"] == layer]
        longest = max(map(len, heads))
        padded = np.full((len(heads), longest), np.nan)
        for line, variances in zip(padded, heads, strict=True):
            line[: len(variances)] = np.sqrt(np.maximum(variances, 0))
        label = f"layer {layer}" if layer in (layers[0], layers[-1]) else None
        channels = range(1, longest + 1)
        axes.plot(channels, np.nanmedian(padded, axis=0), color=color, label=label, lw=1)
    axes.set(xlabel="latent channel", ylabel="standard deviation")
    log_scale(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def key_error(rows: Sequence[dict]) -> Figure:
    """Relative error of the keys by layer, a line for each method.

    Parameters
    ----------
    rows : of ``"key_error"``: layer, method, relative_error, bits.
    """
    figure = new_figure(10, 4.8)
    axes = figure.subplots()
    methods = list(dict.fromkeys(method_of(row) for row in rows))
    for index, method in enumerate(methods):
        group = sorted((r for r in rows if method_of(r) == method), key=lambda row: row["layer"])
        layers, errors = ([row[key] for row in group] for key in ("layer", "relative_error"))
        marker = MARKERS[index % len(MARKERS)]
        color = matplotlib.colormaps["tab20"](index % 20)
        axes.plot(layers, errors, f"{marker}-", color=color, label=method, ms=4, lw=1)
    axes.set(xlabel="layer", ylabel="relative error of the keys")
    log_scale(axes)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


# Benchmark of rows -> what its plots are called, and how they are drawn; in the order of a page.
PLOTS: dict[str, tuple[str, Callable[[Sequence[dict]], Figure]]] = {
    "perplexity": ("Error of predictions", perplexity_plot),
    "sparsity": ("Attention mass that is read", recall),
    "sparse": ("Time of a decode step", decode_time),
    "retrieval": ("Retrieval", retrieval_plot),
    "bits": ("Bits by layer and head", bits_heat),
    "spectrum": ("Decay of the keys' latent channels", spectrum),
    "key_error": ("Error of the keys by layer", key_error),
}
