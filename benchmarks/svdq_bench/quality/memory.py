"""Bytes of a cache of a given length, computed from the layout of its pages."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache

from svdq.cache.cache import SVDqCache
from svdq.cache.layer import SVDqLayer
from svdq.layout import PAGE_TOKENS
from svdq.store.window import GRANULE


def full_cache_bytes(cache: DynamicCache, num_tokens: int | None = None) -> int:
    """Bytes that keys and values of one sequence take in a full cache.

    Parameters
    ----------
    cache : a prefilled cache; its layers tell heads, sizes and dtype.
    num_tokens : length to compute for; None for the cache's own.
    """
    return sum(_layer_bytes(layer, num_tokens) for layer in cache.layers)


def svdq_cache_bytes(cache: SVDqCache, num_tokens: int) -> int:
    """Bytes that a cache like this takes right after a prefill of one sequence of ``num_tokens``.

    Pages, window, bases, scales, means, page tables and lengths: all that ``memory_report``
    counts. The cache must have packed a prefill already; its layouts tell the sizes. Sliding-window
    layers count with their windows (transformers frees the rest of a prefill there at the next
    token).
    """
    total = sum(x.nbytes for x in cache._frequencies)
    for layer in cache.layers:
        if isinstance(layer, SVDqLayer):
            total += _packed_layer_bytes(layer, num_tokens)
        else:
            total += _layer_bytes(layer, num_tokens)
    return total


def _layer_bytes(layer, num_tokens: int | None) -> int:
    """Bytes of a layer of transformers, which holds all tokens or, where it slides, its window."""
    held = layer.keys.shape[-2]
    if num_tokens is None:
        num_tokens = held
    elif layer.is_sliding:
        num_tokens = min(num_tokens, held)
    extra = sum(
        value.nbytes
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and name not in ("keys", "values")
    )
    return (layer.keys.nbytes + layer.values.nbytes) // held * num_tokens + extra


def _packed_layer_bytes(layer: SVDqLayer, num_tokens: int) -> int:
    tokens, packed = layer.tokens, layer.tokens.packed
    _, heads, _, dim = tokens.window.keys.shape
    row_bytes = 2 * heads * dim * tokens.window.keys.itemsize
    settings = tokens.settings
    slots = 0
    if packed is not None and num_tokens >= tokens.fit_tokens:
        slots = (num_tokens - settings.residual_length) // PAGE_TOKENS * PAGE_TOKENS
    rows = num_tokens - max(slots - settings.sink_tokens, 0)
    rows = max(rows, tokens.steady_tokens if slots else 0)
    rows = -(-rows // GRANULE) * GRANULE
    total = rows * row_bytes + tokens.window.lens.nbytes
    if packed is None:
        return total
    pages = slots // PAGE_TOKENS
    v_page_bytes = packed.pool.v_pages.shape[1] * packed.pool.v_pages.itemsize
    total += pages * (packed.layout.k_page_bytes + v_page_bytes)
    total += pages * packed.pool.page_table.itemsize
    shared = (*packed.codec.tensors().values(), packed.pool.cache_seqlens, packed.first_position)
    shared = (*shared, packed.drift.fit_error, packed.drift.error)
    if packed.outliers is not None:
        # As many a token as this cache has.
        total += round(
            (packed.outliers.slots.nbytes + packed.outliers.keys.nbytes) / max(packed.slots) * slots
        )
        total += packed.outliers.min_error.nbytes
    return total + sum(x.nbytes for x in shared)
