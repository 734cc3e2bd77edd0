"""Calibrated codecs, by the formulas alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svdq.layout import PageLayout
from svdq.ops import KeyCodec
from svdq.reference.keys import (
    SAMPLE_TOKENS,
    _best_range,
    _stored,
    _unrotated,
    channel_widths,
    head_slices,
    latents,
    rotate,
)


def join_windows(windows: Sequence[Tensor], inv_freq: Tensor | None) -> Tensor:
    """Keys of windows [H, T, D], each rotated by its own positions 0, 1 ..., as keys of one
    sequence: the un-rotated keys, rotated by positions that go on from window to window. Float64.
    """
    rows = torch.cat([_unrotated(keys, inv_freq, 0) for keys in windows], dim=1)
    return rotate(rows, torch.arange(rows.shape[1]), inv_freq)


def fit_ranges(
    keys: Tensor,
    codec: KeyCodec,
    layout: PageLayout,
    *,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> KeyCodec:
    """Mean and scales of keys in the directions of a codec's rows, whose norms stay.

    With the least-error range (s, c) of the latents along the direction ``u = row / |row|``, a
    scale is ``s |row|`` and the mean moves by the sum of ``c u``: the codes are those of s.
    """
    widths, rows = channel_widths(layout), _unrotated(keys, inv_freq, position)
    norms = codec.basis.double().norm(dim=1)
    units = codec.basis.double() / norms[:, None]
    mean = rows.mean(dim=1)
    latent = latents(rows, units, mean, layout)
    every = -(-latent.shape[0] // SAMPLE_TOKENS) if clip else 1
    multiples = [k / 10 for k in range(4, 81)] if clip else []
    scale, centre = _best_range(latent[::every], widths, multiples)
    shifts = torch.stack([centre[at] @ units[at] for at in head_slices(layout)])
    like = codec.mean
    return replace(codec, scale=_stored(scale * norms, like), mean=_stored(mean + shifts, like))
