"""Fitting what keys of any layout are coded with: one space, or the two of a hybrid layout.

Widths may follow from the spectrum of the keys, so fitting has two halves: :func:`fit_bases` needs
no widths but those of a hybrid layout's core, :func:`fit_codes` needs all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq import ops
from svdq.fit.pre_channels import Core
from svdq.fit.weighting import score_spectrum
from svdq.layout import PageLayout

# Keys of longer prompts are thinned out before a basis is fitted to them: neighbours say much the
# same, and the error of the basis falls with the root of their number.
BASIS_TOKENS = 12288


@dataclass(frozen=True)
class Bases:
    """What is known of keys before their widths are.

    Parameters
    ----------
    mean : [H, D] float32, of a hybrid layout's tail.
    components : [H, D, D] float32, rows by falling importance.
    spectrum : [H, D] float32, that importance: variances, of scores where queries are known.
    core : basis rows, scales and mean [H, D] of a hybrid layout's core channels, else None.
    """

    mean: Tensor
    components: Tensor
    spectrum: Tensor
    core: tuple[Tensor, Tensor, Tensor] | None = None


def thinned(
    keys: Tensor, inv_freq: Tensor | None, position: int, most: int | None = None
) -> tuple[Tensor, Tensor | None, int]:
    """Every key, every second, every fourth and so on: at most ``most`` (``BASIS_TOKENS``).

    Parameters
    ----------
    keys, inv_freq, position : as for :func:`svdq.ops.fit_basis`.

    Returns
    -------
    The same three for the keys that are left, a view, as though their positions were one apart: a
    step of a power of two, from a multiple of itself on, scales frequencies without rounding.
    """
    most = BASIS_TOKENS if most is None else most
    step = 1
    while -(-keys.shape[1] // step) > most:
        step *= 2
    first = -position % step
    inv_freq = None if inv_freq is None else inv_freq * step
    return keys[:, first::step], inv_freq, (position + first) // step


def fit_bases(
    keys: Tensor,
    core: Core | None = None,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
    energy: Tensor | None = None,
) -> Bases:
    """Mean and components of keys or, with a core, of what it leaves.

    Of more than ``BASIS_TOKENS`` keys an even sample is taken, unless a core's ranges must span
    all of them.

    Parameters
    ----------
    keys, inv_freq, position, clip : as for :func:`svdq.ops.fit_quantizer`.
    core : of a hybrid layout; None where keys are coded in one space.
    energy : [H, D] of the queries, by which channels count, see :func:`score_spectrum`; None: by
        their variance.
    """
    if clip or core is None:
        keys, inv_freq, position = thinned(keys, inv_freq, position)
    mean, components, spectrum = ops.fit_basis(keys, inv_freq, position)
    fitted = None
    if core is not None:
        layout = core.layout
        if layout.core is not None:
            components, spectrum = core.spare(components, spectrum, energy)
            if energy is not None:
                components, _ = score_spectrum(components, spectrum, energy)
            fitted = ops.fit_quantizer(
                keys, mean, components, layout.core, inv_freq, position, clip
            )
        else:  # the rotated mean alone
            empty = keys.new_zeros((0, layout.head_dim), dtype=torch.bfloat16)
            fitted = empty, mean.new_zeros(0), mean
        residual = ops.residual_keys(keys, *_spread(fitted, layout), layout, inv_freq, position)
        mean, components, spectrum = ops.fit_basis(residual)
    if energy is not None:
        components, spectrum = score_spectrum(components, spectrum, energy)
    return Bases(mean, components, spectrum, fitted)


def fit_codes(
    keys: Tensor,
    bases: Bases,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Basis rows, scales and means for a layout's widths; results as of :func:`fit_keys`."""
    if bases.core is None:
        fitted = ops.fit_quantizer(
            keys, bases.mean, bases.components, layout, inv_freq, position, clip
        )
        return *fitted, None
    basis, scale, mean = _spread(bases.core, layout)
    post_mean = bases.mean
    if layout.tail is not None:
        _, tail_rows = _rows_of_parts(layout, keys.device)
        residual = ops.residual_keys(keys, basis, scale, mean, layout, inv_freq, position)
        basis[tail_rows], scale[tail_rows], post_mean = ops.fit_quantizer(
            residual, post_mean, bases.components, layout.tail, clip=clip
        )
    return basis, scale, mean, post_mean


def fit_keys(
    keys: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Fit basis, scales and means of a layer's keys.

    A hybrid layout's core is fitted to the un-rotated keys, but for the RoPE pairs that it spares
    (svdq/core.py), then its tail to what the decoded core leaves of the rotated ones.

    Parameters
    ----------
    keys, inv_freq, position, clip : as for :func:`svdq.ops.fit_quantizer`.
    layout : widths of every head's channels.

    Returns
    -------
    basis : [R, D] bfloat16, a head's core channels before its tail channels.
    scale : [R] float32.
    mean : [H, D] float32; of a hybrid layout the core's, which is rotated.
    post_mean : [H, D] float32 of a hybrid layout, else None.
    """
    bases = fit_bases(keys, Core.of(layout, inv_freq), inv_freq, position, clip)
    return fit_codes(keys, bases, layout, inv_freq, position, clip)


def _spread(
    core: tuple[Tensor, Tensor, Tensor], layout: PageLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """What decodes core channels in the places of a layout: basis [R, D], scale [R] and mean."""
    rows, scales, mean = core
    core_rows, _ = _rows_of_parts(layout, rows.device)
    basis = rows.new_zeros((layout.rank, layout.head_dim))
    scale = scales.new_zeros(layout.rank)
    basis[core_rows], scale[core_rows] = rows, scales
    return basis, scale, mean


def _rows_of_parts(layout: PageLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the basis that are core channels, and those that are tail channels."""
    flags = []
    for core, tail in zip(layout.pre_bands, layout.bands, strict=True):
        flags += [True] * sum(core) + [False] * sum(tail)
    is_core = torch.tensor(flags)
    return is_core.nonzero()[:, 0].to(device), (~is_core).nonzero()[:, 0].to(device)
