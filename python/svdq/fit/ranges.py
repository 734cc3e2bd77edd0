"""Means and scales of keys in a basis that is given, and the errors of a codec."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq import ops
from svdq.layout import PageLayout, pages_of
from svdq.ops import KeyCodec


def fit_ranges(
    keys: Tensor,
    codec: KeyCodec,
    layout: PageLayout,
    *,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> KeyCodec:
    """Mean and scales of keys in the basis of a codec.

    A row of the basis is a unit vector times the root of the gain that makes its codes unbiased
    (docs/format.md). The row stays, so its scale is chosen for the gain that it has.

    Parameters
    ----------
    keys, inv_freq, position, clip : as for :func:`svdq.ops.fit_quantizer`.
    codec : of one sequence.
    layout : widths of every head's channels, ``"pre"`` or ``"post"``.

    Returns
    -------
    The codec with mean and scales of these keys, [H, D] and [R].
    """
    heads, dim = layout.num_kv_heads, layout.head_dim
    norms = torch.linalg.vector_norm(codec.basis.float(), dim=1)
    units = codec.basis.float() / norms.clamp(min=1e-30)[:, None]
    components = codec.mean.new_zeros(heads, dim, dim)
    ranks = [sum(pre) + sum(post) for pre, post in layout.head_bands]
    for h, rows in enumerate(units.split(ranks)):
        components[h, : len(rows)] = rows
    mean, _, _ = ops.fit_basis(keys, inv_freq, position)
    own = ops.fit_quantizer(
        keys, mean, components, layout, inv_freq=inv_freq, position=position, clip=clip
    )
    # A code is latent / scale in a row of norm 1: the scale of a row of another norm is in
    # proportion.
    own_norms = torch.linalg.vector_norm(own.basis.float(), dim=1).clamp(min=1e-30)
    return KeyCodec(codec.basis, own.scale * norms / own_norms, own.mean, inv_freq=codec.inv_freq)


def coding_errors(keys: Tensor, codec: KeyCodec, layout: PageLayout, position: int = 0) -> Tensor:
    """Squared error of every decoded key, [H, T] float32.

    Parameters
    ----------
    keys : [H, T, D] float32, bfloat16 or float16, rotated, times their gain.
    codec : of one sequence.
    layout : of the pages that the keys would be packed in.
    position : position of ``keys[:, 0]``.
    """
    count = pages_of(keys.shape[1])
    pages = torch.empty((count, layout.k_page_bytes), dtype=torch.uint8, device=keys.device)
    errors = torch.empty(keys.shape[:2], device=keys.device)
    table = torch.arange(count, dtype=torch.int32)
    ops.pack_keys_(pages, keys, codec, layout, table, 0, position=position, errors=errors)
    return errors
