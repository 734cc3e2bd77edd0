"""Plots of the error of predictions: against bits, size and budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from matplotlib.figure import Figure

from svdq_bench.quality.budgets import budget_text
from svdq_bench.quality.drawing import (
    MARKERS,
    budget_line,
    budget_scale,
    family_of,
    log_scale,
    new_figure,
    plain,
)


def perplexity_plot(rows: Sequence[dict]) -> Figure:
    """Error against budget where some rows have one, against size where values are coded, or bits.

    Values coded in a part of the rows alone do not make them comparable: then it is bits, too.
    """
    if any("budget" in row for row in rows):
        return error_against_budget(rows)
    measured = [row for row in rows if row.get("kl", 0) > 0]
    whole = bool(measured) and all(map(is_whole, measured))
    return error_against_size(rows) if whole else error_against_bits(rows)


def error_against_bits(rows: Sequence[dict]) -> Figure:
    """KL divergence against the true bits of a key, a marker for each family of methods.

    Parameters
    ----------
    rows : of ``"perplexity"``; those without a divergence (the full cache) have no point.
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    families = _groups(rows, family_of)
    for index, (family, group) in enumerate(families.items()):
        group.sort(key=lambda row: row["all_in_bits"])
        bits, kl = ([row[key] for row in group] for key in ("all_in_bits", "kl"))
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(bits, kl, marker, label=family, color=f"C{index % 10}")
        for row in group:
            place = (row["all_in_bits"], row["kl"])
            axes.annotate(
                row["method"], place, (5, 4), textcoords="offset points", fontsize=7, alpha=0.8
            )
    axes.set(xlabel="bits a key number, everything counted", ylabel="KL to the full cache, nats")
    if families:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(plain)
        log_scale(axes)
        axes.margins(x=0.15)
        axes.legend()
    axes.grid(alpha=0.3)
    return figure


def error_against_size(rows: Sequence[dict]) -> Figure:
    """KL divergence against the size of the whole cache, a line for each kind of method.

    Parameters
    ----------
    rows : of ``"perplexity"``; those without a divergence (the full cache) have no point, nor have
        those whose values are exact.
    """
    figure = new_figure(9, 5.6)
    axes = figure.subplots()
    for index, (line, group) in enumerate(_groups(filter(is_whole, rows), line_of).items()):
        group.sort(key=lambda row: row["times_smaller_bf16"])
        times, kl = ([row[key] for row in group] for key in ("times_smaller_bf16", "kl"))
        marker, color = MARKERS[index % len(MARKERS)], f"C{index % 10}"
        axes.plot(times, kl, f"{marker}-", label=line, color=color, ms=5, lw=1)
        for row in group:
            axes.annotate(
                bits_of(row),
                (row["times_smaller_bf16"], row["kl"]),
                (5, 4),
                textcoords="offset points",
                fontsize=7,
                alpha=0.8,
            )
    axes.set(
        xlabel="times smaller than bfloat16, keys and values, everything counted",
        ylabel="KL to the full cache, nats",
    )
    log_scale(axes)
    axes.margins(x=0.06)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def is_whole(row: dict) -> bool:
    """True if a row is of a cache that codes keys and values, and says its size."""
    return "times_smaller_bf16" in row and row.get("v_bits", "exact") != "exact"


def bits_of(row: dict) -> str:
    """Bits of a row's key codes and value codes, "K2 V4", or the share of channels: "K50% V4"."""
    keys = f"{100 * row['kept']:.3g}%" if "kept" in row else f"{row['k_bits']:.3g}"
    return f"K{keys} V{row['v_bits']}"


def line_of(row: dict) -> str:
    """Family of a row, and what divides the family besides bits."""
    words = [family_of(row)]
    if "rope" in row:
        words.append(f"{row['rope']}-RoPE")
    if "skipped_layers" in row:
        words.append(f"{row['skipped_layers']} exact layers an end")
    return ", ".join(words)


def _groups(rows: Iterable[dict], name: Callable[[dict], str]) -> dict[str, list[dict]]:
    """Rows that have a divergence, by a name."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row.get("kl", 0) > 0:
            groups.setdefault(name(row), []).append(row)
    return groups


def error_against_budget(rows: Sequence[dict]) -> Figure:
    """KL divergence against the budget, a line for each scorer, and without a budget.

    Parameters
    ----------
    rows : of ``"perplexity"``; those of other caches than svdq are left out.
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    lines: dict[str, list[dict]] = {}
    for row in rows:
        if "budget" in row:
            lines.setdefault(scorer_of(row), []).append(row)
        elif "preset" in row and row["kl"] > 0:
            axes.axhline(row["kl"], ls="--", color="gray", label=row["method"])
    for index, (scorer, group) in enumerate(lines.items()):
        budget_line(axes, index, scorer, group, "kl")
    budget_scale(axes, [row for group in lines.values() for row in group])
    axes.set(ylabel="KL to the full cache, nats")
    log_scale(axes)
    axes.legend(fontsize=8)
    return figure


def scorer_of(row: dict) -> str:
    """The scorer of a row with a budget."""
    return row["method"].replace(f"{budget_text(row['budget'])} ", "")
