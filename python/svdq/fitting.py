"""Fitting what keys of any layout are coded with: one space, or the two of a hybrid layout."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq import ops
from svdq.layout import PageLayout


def fit_keys(
    keys: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Fit basis, scales and means of a layer's keys.

    A hybrid layout's core is fitted to the un-rotated keys, then its tail to what the decoded core
    leaves of the rotated ones.

    Parameters
    ----------
    keys, inv_freq, position, clip : as for :func:`svdq.ops.fit_quantizer`.
    layout : widths of every head's channels.

    Returns
    -------
    basis : [R, D] bfloat16, a head's core channels before its tail channels.
    scale : [R] float32.
    mean : [H, D] float32; of a hybrid layout the core's, which is rotated.
    tail_mean : [H, D] float32 of a hybrid layout, else None.
    """
    mean, components, _ = ops.fit_basis(keys, inv_freq, position)
    if layout.rope != "hybrid":
        fitted = ops.fit_quantizer(keys, mean, components, layout, inv_freq, position, clip)
        return *fitted, None
    core_rows, tail_rows = _rows_of_parts(layout, keys.device)
    basis = keys.new_zeros((layout.rank, layout.head_dim), dtype=torch.bfloat16)
    scale = mean.new_zeros(layout.rank)
    if layout.core is not None:
        basis[core_rows], scale[core_rows], mean = ops.fit_quantizer(
            keys, mean, components, layout.core, inv_freq, position, clip
        )
    residual = ops.residual_keys(keys, basis, scale, mean, layout, inv_freq, position)
    tail_mean, components, _ = ops.fit_basis(residual)
    if layout.tail is not None:
        basis[tail_rows], scale[tail_rows], tail_mean = ops.fit_quantizer(
            residual, tail_mean, components, layout.tail, clip=clip
        )
    return basis, scale, mean, tail_mean


def _rows_of_parts(layout: PageLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the basis that are core channels, and those that are tail channels."""
    flags = []
    for core, tail in zip(layout.core_bands, layout.bands, strict=True):
        flags += [True] * sum(core) + [False] * sum(tail)
    is_core = torch.tensor(flags)
    return is_core.nonzero()[:, 0].to(device), (~is_core).nonzero()[:, 0].to(device)
