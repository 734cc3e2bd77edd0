"""Bytes of a cache of a given length, computed from the layout of its pages."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache

from svdq.cache.cache import SVDqCache
from svdq.cache.layer import SVDqLayer
from svdq.layout import PAGE_TOKENS
from svdq.store.window import GRANULE

BF16_BYTES = 2


def full_cache_bytes(
    cache: DynamicCache, num_tokens: int | None = None, itemsize: int | None = None
) -> int:
    """Bytes that keys and values of one sequence take in a full cache.

    Parameters
    ----------
    cache : a prefilled cache; its layers tell heads, sizes and dtype.
    num_tokens : length to compute for; None for the cache's own.
    itemsize : bytes of a number; None for those of the cache's dtype.
    """
    return sum(_layer_bytes(layer, num_tokens, itemsize) for layer in cache.layers)


def bf16_bytes(cache: SVDqCache) -> tuple[int, int]:
    """Bytes of a full cache and of this one, had the model computed it in bfloat16.

    Codes, scales and bases are the same in every model. Sinks, windows, exact values and layers
    that are not compressed have the model's dtype, so that a float32 model holds them at twice the
    bytes: they are counted at 2 bytes a number, with the room to grow into. What a calibration
    shares between all prompts is left out.

    Returns
    -------
    full, held : bytes; ``full / held`` is how many times smaller the cache is.
    """
    full, held = 0, cache.memory_report().prompt_bytes
    for layer in cache.layers:
        if not isinstance(layer, SVDqLayer):
            full += _layer_bytes(layer, None, BF16_BYTES)
            held -= _bf16_saving(layer.keys, layer.values)
            continue
        window = layer.tokens.window
        batch, heads, _, dim = window.keys.shape
        tokens = sum(layer.tokens.count(b) for b in range(batch))
        full += 2 * tokens * heads * dim * BF16_BYTES
        held -= _bf16_saving(window.keys, window.values)
        # Pages of exact values are tensors of the model's dtype, those of codes are bytes.
        pools = [store.pool.v_pages for store in layer.tokens.stores]
        held -= _bf16_saving(*(pages for pages in pools if pages.dtype == window.keys.dtype))
    return full, held


def _bf16_saving(*tensors: Tensor) -> int:
    """Bytes that the storages of tensors would not take if their numbers were bfloat16."""
    sizes = {x.untyped_storage().data_ptr(): (x.untyped_storage().nbytes(), x) for x in tensors}
    return sum(n // x.itemsize * (x.itemsize - BF16_BYTES) for n, x in sizes.values())


def svdq_cache_bytes(cache: SVDqCache, num_tokens: int) -> int:
    """Bytes that a cache like this takes right after a prefill of one sequence of ``num_tokens``.

    Pages, window, bases, scales, means, page tables and lengths: all that ``memory_report``
    counts. The cache must have packed a prefill already; its layouts tell the sizes. Sliding-window
    layers count with their windows (transformers frees the rest of a prefill there at the next
    token).
    """
    total = sum(x.nbytes for x in cache._frequencies.known)
    for layer in cache.layers:
        if isinstance(layer, SVDqLayer):
            total += _packed_layer_bytes(layer, num_tokens)
        else:
            total += _layer_bytes(layer, num_tokens)
    return total


def _layer_bytes(layer, num_tokens: int | None, itemsize: int | None = None) -> int:
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
    numbers = (layer.keys.numel() + layer.values.numel()) // held * num_tokens
    return numbers * (itemsize or layer.keys.itemsize) + extra


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
    shared = (*packed.own_tensors().values(), packed.pool.cache_seqlens, packed.first_position)
    shared = (*shared, packed.drift.fit_error, packed.drift.error)
    if packed.outliers is not None:
        # As many a token as this cache has.
        total += round(
            (packed.outliers.slots.nbytes + packed.outliers.keys.nbytes) / max(packed.slots) * slots
        )
        total += packed.outliers.min_error.nbytes
    return total + sum(x.nbytes for x in shared)
