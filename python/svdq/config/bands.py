"""Bands of a head by a schedule, and the size of groups of value channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from svdq import ops
from svdq.layout import Bands


def scheduled_bands(
    head_dim: int, schedule: Sequence[int], pre_channels: int = 0
) -> tuple[Bands, Bands]:
    """Pre-RoPE and post-RoPE bands of a head by a schedule, whose first channels are pre-RoPE."""
    bands = ops.allocate_bits(torch.zeros(1, head_dim), list(schedule))[0].tolist()
    pre, left = [], pre_channels
    for count in bands:
        pre.append(min(count, left))
        left -= pre[-1]
    return tuple(pre), tuple(n - own for n, own in zip(bands, pre, strict=True))


def default_group_size(head_dim: int) -> int:
    """Channels that share a value scale: 64 if that divides, else a small head, else near 64."""
    if head_dim % 64 == 0:
        return 64
    if head_dim < 128:
        return head_dim
    sizes = [n for n in range(16, head_dim + 1, 16) if head_dim % n == 0] or [head_dim]
    return min(sizes, key=lambda n: max(n / 64, 64 / n))
