"""What several plots share: figures, scales and lines over budgets."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from svdq_bench.quality.budgets import budget_text

MARKERS = "osD^vP*X<>"


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plain(value: float, _: int) -> str:
    return f"{value:g}"


def log_scale(axes: Axes) -> None:
    """A logarithmic scale of y with numbers at 1, 2 and 5, without superscripts."""
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)


def budget_line(axes: Axes, index: int, label: str, group: Sequence[dict], key: str) -> None:
    group = sorted(group, key=lambda row: row["budget"])
    budgets, values = ([row[name] for row in group] for name in ("budget", key))
    marker, color = MARKERS[index % len(MARKERS)], f"C{index % 10}"
    axes.plot(budgets, values, f"{marker}-", label=label, color=color, ms=4, lw=1)


def budget_scale(axes: Axes, rows: Sequence[dict]) -> None:
    budgets = sorted({row["budget"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(budgets, [budget_text(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("budget")
    axes.grid(alpha=0.3)
