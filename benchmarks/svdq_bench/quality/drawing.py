"""Parts that plots share: figures, scales, lines, heat maps, and names of methods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from svdq_bench.quality.budgets import budget_text

MARKERS = "osD^vP*X<>"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def plain(value: float, _: int) -> str:
    """A tick as a number without zeros at the end."""
    return f"{value:g}"


def log_scale(axes: Axes) -> None:
    """A logarithmic scale of y with numbers at 1, 2 and 5, without superscripts."""
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)


def family_of(row: dict) -> str:
    """The kind of method of a row."""
    return row.get("family") or row["method"].split()[0]


def method_of(row: dict) -> str:
    """The method of a row, values named; a matched peer is one whatever settings it was given."""
    name, v_bits = row.get("matched") or row["method"], row.get("v_bits")
    return name if v_bits in (None, "exact") else f"{name}, {v_bits}-bit values"


def draw_heat(
    axes: Axes, values: np.ndarray, low: float, high: float | None, colors: str, write: str
) -> QuadMesh:
    """Cells with their numbers in them, the first row on top; empty where there is none."""
    y_edges, x_edges = (np.arange(n + 1) - 0.5 for n in values.shape)
    image = axes.pcolormesh(x_edges, y_edges, values, vmin=low, vmax=high, cmap=colors)
    axes.invert_yaxis()
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.45 else "white"
            text = write.format(value)
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
    return image


def budget_line(axes: Axes, index: int, label: str, group: Sequence[dict], key: str) -> None:
    """A line of a column against the budget."""
    group = sorted(group, key=lambda row: row["budget"])
    budgets, values = ([row[name] for row in group] for name in ("budget", key))
    marker, color = MARKERS[index % len(MARKERS)], f"C{index % 10}"
    axes.plot(budgets, values, f"{marker}-", label=label, color=color, ms=4, lw=1)


def budget_scale(axes: Axes, rows: Sequence[dict]) -> None:
    """A logarithmic scale of x with the budgets of all rows."""
    budgets = sorted({row["budget"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(budgets, [budget_text(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("budget")
    axes.grid(alpha=0.3)
