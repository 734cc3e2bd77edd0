"""The demo's picture: singular values and the bits they get, memory over context, decode speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

BIT_COLORS = {8: "#08519c", 4: "#3182bd", 2: "#6baed6", 1: "#bdd7e7", 0: "#f2f2f2"}
FULL_COLOR, SVDQ_COLOR = "#7f7f7f", "#d95f02"


@dataclass(frozen=True)
class MemoryCurves:
    """Cache bytes against context length.

    Parameters
    ----------
    tokens : context lengths.
    full_bytes, svdq_bytes : bytes of either cache at these lengths.
    measured : context length and bytes that the demo's own cache reported.
    """

    tokens: Sequence[int]
    full_bytes: Sequence[int]
    svdq_bytes: Sequence[int]
    measured: tuple[int, int]


def draw(
    path: Path,
    variances: Tensor,
    channel_bits: Tensor,
    memory: MemoryCurves,
    rows: Sequence[dict],
    title: str,
) -> None:
    """Write the picture to a file whose suffix names its format.

    Parameters
    ----------
    variances : [N, D] channel variances of N heads (of all layers), in descending order.
    channel_bits : [N, D] bits given to these channels.
    memory : the curves.
    rows : the demo's rows.
    """
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    decay, size, speed = figure.subplots(1, 3, width_ratios=(5, 4, 3))
    draw_decay(decay, variances, channel_bits)
    draw_memory(size, memory)
    draw_speed(speed, rows)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def draw_decay(axes: Axes, variances: Tensor, channel_bits: Tensor) -> None:
    """Standard deviation per latent channel, of all heads, above the bits that channels get."""
    deviation = variances.double().clamp_min(0).sqrt()
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, median, high = torch.quantile(deviation, quantiles, dim=0)
    channels = torch.arange(1, deviation.shape[1] + 1)
    # Heads may differ in their bits; the shading shows what the middle head gives each channel.
    widths = channel_bits.median(dim=0).values.tolist()
    for start, stop, width in runs(widths):
        axes.axvspan(start + 0.5, stop + 0.5, color=BIT_COLORS[width], alpha=0.55, lw=0)
        name = f"{width} bit{'s' if width > 1 else ''}" if width else "dropped"
        axes.text((start + stop + 1) / 2, 0.98, name, ha="center", va="top", fontsize=8,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.fill_between(
        channels, low, high, color="black", alpha=0.2, lw=0, label="10th to 90th percentile"
    )
    axes.plot(channels, median, color="black", label="median of all layers and heads")
    axes.set(yscale="log", xlim=(0.5, len(channels) + 0.5))
    axes.set(xlabel="latent channel", ylabel="standard deviation (singular value / √tokens)")
    axes.set_title("Decay of the keys' singular values, and the bits given")
    axes.legend(loc="lower left", fontsize=8)


def runs(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal widths as (start, stop, width)."""
    found, start = [], 0
    for index in range(1, len(widths) + 1):
        if index == len(widths) or widths[index] != widths[start]:
            found.append((start, index, int(widths[start])))
            start = index
    return found


def draw_memory(axes: Axes, memory: MemoryCurves) -> None:
    """Bytes of both caches against context length."""
    megabytes = lambda values: [value / 1e6 for value in values]  # noqa: E731
    axes.plot(memory.tokens, megabytes(memory.full_bytes), color=FULL_COLOR, label="full cache")
    axes.plot(memory.tokens, megabytes(memory.svdq_bytes), color=SVDQ_COLOR, label="svdq, all in")
    tokens, num_bytes = memory.measured
    axes.plot([tokens], megabytes([num_bytes]), "o", color=SVDQ_COLOR, label="svdq, this run")
    axes.set(
        xlabel="context (tokens)", ylabel="keys and values (MB)", xlim=(0, None), ylim=(0, None)
    )
    axes.set_title("Memory of the cache")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)


def draw_speed(axes: Axes, rows: Sequence[dict]) -> None:
    """Tokens per second of both caches."""
    bars = axes.bar(
        [row["method"].replace(", ", "\n").replace("svdq ", "svdq\n") for row in rows],
        [row["tokens_per_second"] for row in rows],
        color=(FULL_COLOR, SVDQ_COLOR),
        width=0.6,
    )
    axes.bar_label(bars, fmt="%.1f")
    axes.set(ylabel="tokens per second")
    axes.set_title(f"Decode after {rows[0]['prompt_tokens']:,} tokens")
