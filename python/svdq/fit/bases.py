"""Fitting of the codec of keys for any layout: one space, or the two of a hybrid layout.

Widths may follow from the spectrum of the keys, so fitting has two halves: :func:`fit_bases` needs
no widths except those of a hybrid layout's pre-RoPE channels, :func:`fit_codes` needs all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq import ops
from svdq.fit.key_gain import score_spectrum
from svdq.fit.pre_channels import PreChannels
from svdq.layout import PageLayout
from svdq.ops import KeyCodec

# Keys of longer prompts are thinned out before a basis is fitted to them: neighbours say much the
# same, and the error of the basis falls with the root of their number.
BASIS_TOKENS = 12288


@dataclass(frozen=True)
class Bases:
    """The part of a fit that needs no widths.

    Parameters
    ----------
    mean : [H, D] float32; of a hybrid layout that of the post-RoPE channels.
    components : [H, D, D] float32, rows by falling importance.
    spectrum : [H, D] float32, that importance: variances, of scores where queries are known.
    pre : codec of a hybrid layout's pre-RoPE channels, else None.
    """

    mean: Tensor
    components: Tensor
    spectrum: Tensor
    pre: KeyCodec | None = None


def thinned(
    keys: Tensor, inv_freq: Tensor | None, position: int, max_tokens: int | None = None
) -> tuple[Tensor, Tensor | None, int]:
    """Every key, every second, every fourth and so on: at most ``max_tokens`` (``BASIS_TOKENS``).

    Parameters
    ----------
    keys, inv_freq, position : as for :func:`svdq.ops.fit_basis`.

    Returns
    -------
    The same three for the keys that are left, a view, as though their positions were one apart: a
    stride of a power of two, from a multiple of itself on, scales frequencies without rounding.
    """
    max_tokens = BASIS_TOKENS if max_tokens is None else max_tokens
    stride = 1
    while -(-keys.shape[1] // stride) > max_tokens:
        stride *= 2
    first = -position % stride
    inv_freq = None if inv_freq is None else inv_freq * stride
    return keys[:, first::stride], inv_freq, (position + first) // stride


def fit_bases(
    keys: Tensor,
    pre: PreChannels | None = None,
    *,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
    energy: Tensor | None = None,
) -> Bases:
    """Mean and components of keys or, with pre-RoPE channels, of what those leave.

    Of more than ``BASIS_TOKENS`` keys an even sample is taken, unless the ranges of pre-RoPE
    channels must span all of them.

    Parameters
    ----------
    keys, inv_freq, position, clip : as for :func:`svdq.ops.fit_quantizer`.
    pre : pre-RoPE channels of a hybrid layout; None where keys are coded in one space.
    energy : [H, D] of the queries, by which channels count, see :func:`score_spectrum`; None: by
        their variance.
    """
    if clip or pre is None:
        keys, inv_freq, position = thinned(keys, inv_freq, position)
    mean, components, spectrum = ops.fit_basis(keys, inv_freq, position)
    codec = None
    if pre is not None:
        part = pre.layout.pre_part
        if part is not None:
            components, spectrum = pre.drop(components, spectrum, energy)
            if energy is not None:
                components, _ = score_spectrum(components, spectrum, energy)
            codec = ops.fit_quantizer(
                keys, mean, components, part, inv_freq=inv_freq, position=position, clip=clip
            )
        else:  # the rotated mean alone
            empty = keys.new_zeros((0, pre.layout.head_dim), dtype=torch.bfloat16)
            codec = KeyCodec(empty, mean.new_zeros(0), mean, inv_freq=inv_freq)
        residual = ops.residual_keys(
            keys, _spread(codec, pre.layout), pre.layout, position=position
        )
        mean, components, spectrum = ops.fit_basis(residual)
    if energy is not None:
        components, spectrum = score_spectrum(components, spectrum, energy)
    # Codes get the frequencies of all keys, not of the sample.
    return Bases(mean, components, spectrum, codec and replace(codec, inv_freq=None))


def fit_codes(
    keys: Tensor,
    bases: Bases,
    layout: PageLayout,
    *,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> KeyCodec:
    """The codec of keys for a layout's widths."""
    options = {"inv_freq": inv_freq, "position": position, "clip": clip}
    if bases.pre is None:
        return ops.fit_quantizer(keys, bases.mean, bases.components, layout, **options)
    codec = replace(_spread(bases.pre, layout), post_mean=bases.mean, inv_freq=inv_freq)
    part = layout.post_part
    if part is None:
        return codec
    residual = ops.residual_keys(keys, codec, layout, position=position)
    fitted = ops.fit_quantizer(residual, bases.mean, bases.components, part, clip=clip)
    _, post_rows = _rows_of_parts(layout, keys.device)
    codec.basis[post_rows], codec.scale[post_rows] = fitted.basis, fitted.scale
    return replace(codec, post_mean=fitted.mean)


def fit_keys(
    keys: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> KeyCodec:
    """Fit the codec of a layer's keys.

    The pre-RoPE channels of a hybrid layout are fitted to the un-rotated keys, without the RoPE
    pairs that they drop (svdq/fit/pre_channels.py), then its post-RoPE channels to what the decoded
    ones leave of the rotated keys.

    Parameters
    ----------
    keys, inv_freq, position, clip : as for :func:`svdq.ops.fit_quantizer`.
    layout : widths of every head's channels.
    """
    options = {"inv_freq": inv_freq, "position": position, "clip": clip}
    bases = fit_bases(keys, PreChannels.of(layout, inv_freq), **options)
    return fit_codes(keys, bases, layout, **options)


def _spread(pre: KeyCodec, layout: PageLayout) -> KeyCodec:
    """The codec of pre-RoPE channels alone among the rows of a whole layout, the others zero."""
    pre_rows, _ = _rows_of_parts(layout, pre.basis.device)
    basis = pre.basis.new_zeros((layout.rank, layout.head_dim))
    scale = pre.scale.new_zeros(layout.rank)
    basis[pre_rows], scale[pre_rows] = pre.basis, pre.scale
    return replace(pre, basis=basis, scale=scale)


def _rows_of_parts(layout: PageLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the basis that are pre-RoPE channels, and those that are post-RoPE channels."""
    flags = []
    for pre, post in layout.head_bands:
        flags += [True] * sum(pre) + [False] * sum(post)
    is_pre = torch.tensor(flags)
    return is_pre.nonzero()[:, 0].to(device), (~is_pre).nonzero()[:, 0].to(device)
