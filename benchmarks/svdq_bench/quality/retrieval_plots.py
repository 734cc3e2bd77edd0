"""Plots of retrieval: scores against bits, and accuracy by length and depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from svdq_bench.quality.drawing import (
    MARKERS,
    draw_heat,
    family_of,
    method_of,
    new_figure,
    plain,
)
from svdq_bench.quality.summary import summarize

HEAT_COLUMNS = 3
# Difference of a score, its label, and by what it is multiplied.
SCORES = (
    ("able", "accuracy, points", 100),
    ("probability", "probability, points", 100),
    ("log_likelihood", "log-likelihood, nats", 1),
)


def is_drawable(rows: Sequence[dict]) -> bool:
    """True if rows have depths, or differences from the full cache's scores."""
    return _has_depths(rows) or bool(_differences(rows))


def retrieval_plot(rows: Sequence[dict]) -> Figure:
    """Accuracy by length and depth where depths were asked, else scores against bits."""
    return retrieval_heat(rows) if _has_depths(rows) else scores_against_bits(rows)


def _has_depths(rows: Sequence[dict]) -> bool:
    return any(row.get("depth") is not None for row in rows)


def _differences(rows: Sequence[dict]) -> list[dict]:
    """Lines of the summary, without the full cache's, that differ from it in some score."""
    found = [line for line in summarize(rows) if line["cache_ratio"] != 1]
    return [line for line in found if any(f"{name}_difference" in line for name, _, _ in SCORES)]


def scores_against_bits(rows: Sequence[dict]) -> Figure:
    """Difference from the full cache with its confidence interval against the true bits of a key.

    A panel for each score that lines have; a line for each family of methods and its value bits.
    """
    families: dict[str, list[dict]] = {}
    lines = _differences(rows)
    for line in lines:
        family, v_bits = family_of(line), line.get("v_bits")
        values = "" if v_bits is None else f", values {v_bits}"
        families.setdefault(family + values, []).append(line)
    scores = [one for one in SCORES if any(f"{one[0]}_difference" in line for line in lines)]
    figure = new_figure(4.6 * len(scores), 4.2)
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (name, label, scale) in zip(panels, scores, strict=True):
        for index, (family, group) in enumerate(families.items()):
            group = [line for line in group if f"{name}_difference" in line]
            group.sort(key=lambda line: line["all_in_bits"])
            means = [scale * line[f"{name}_difference"] for line in group]
            widths = [scale * line.get(f"{name}_half_width", 0) for line in group]
            bits = [line["all_in_bits"] for line in group]
            style = {"fmt": f"{MARKERS[index % len(MARKERS)]}-", "color": f"C{index % 10}"}
            axes.errorbar(bits, means, widths, **style, label=family, ms=4, lw=1, capsize=3)
        axes.axhline(0, color="gray", lw=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(plain)
        axes.set(
            xlabel="bits a key number, everything counted", ylabel=f"less the full cache: {label}"
        )
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def retrieval_heat(rows: Sequence[dict]) -> Figure:
    """Accuracy by context length and depth, a panel for each method.

    Parameters
    ----------
    rows : of ``"retrieval"``; those without a depth are left out.
    """
    rows = [row for row in rows if row.get("depth") is not None]
    methods = list(dict.fromkeys(method_of(row) for row in rows))
    lengths = sorted({row["context_tokens"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    columns = min(HEAT_COLUMNS, len(methods))
    lines = -(-len(methods) // columns)
    figure = new_figure(4 * columns, 0.8 + 2.6 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(methods) :]:
        axes.set_axis_off()
    for axes, method in zip(panels.flat, methods, strict=False):
        values = np.full((len(depths), len(lengths)), np.nan)
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                cell = [
                    row
                    for row in rows
                    if (method_of(row), row["depth"], row["context_tokens"])
                    == (method, depth, length)
                ]
                if cell:
                    weights = [row["samples"] for row in cell]
                    values[i, j] = np.average([row["accuracy"] for row in cell], weights=weights)
        image = draw_heat(axes, 100 * values, 0, 100, "RdYlGn", "{:.0f}")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set(xlabel="context, tokens", ylabel="depth of the needle")
        axes.set_title(method, fontsize=9)
    figure.colorbar(image, ax=panels, label="accuracy, %")
    return figure
