"""Bands of a head by a schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from svdq import ops
from svdq.layout import Bands


def scheduled_bands(
    head_dim: int, schedule: Sequence[int], pre_channels: int = 0
) -> tuple[Bands, Bands]:
    """Pre-RoPE and post-RoPE bands of a head by a schedule, whose first channels are pre-RoPE."""
    bands = ops.allocate_bits(torch.zeros(1, head_dim, dtype=torch.float32), list(schedule))[
        0
    ].tolist()
    pre, left = [], pre_channels
    for count in bands:
        pre.append(min(count, left))
        left -= pre[-1]
    return tuple(pre), tuple(n - own for n, own in zip(bands, pre, strict=True))
