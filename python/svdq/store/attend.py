"""Attention over all that a layer holds: stores of packed tokens one after another, exact rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svdq import ops
from svdq.layout import PAGE_TOKENS
from svdq.store.outliers import NO_SLOT
from svdq.store.packed import ExactRows, PackedStore
from svdq.store.sparsity import Sparsity, select


def attend_stores(
    query: Tensor,
    stores: Sequence[PackedStore],
    rows: ExactRows,
    scaling: float,
    sink_tokens: int,
    causal: bool,
    sparsity: Sparsity | None = None,
) -> tuple[Tensor, Tensor, list[int]]:
    """Attend over packed stores in their order and the exact rows that follow them.

    Every store has a basis of its own, so it is a call of its own, and the parts are merged.

    Parameters
    ----------
    query : [B, Hq, L, D].
    stores : at least one; the first holds the sinks.
    rows, scaling, sink_tokens, causal : as for :func:`svdq.ops.attend`.
    sparsity : how to choose what of the packed tokens is attended, for single queries alone; None
        for all of them.

    Returns
    -------
    out, lse : as of :func:`svdq.ops.attend`.
    attended : packed tokens of each store that a KV head attended to, sinks left out, in the
        longest sequence.
    """
    nothing = rows.none() if len(stores) > 1 else rows
    result, attended = None, []
    skipped = [sink_tokens if store is stores[0] else 0 for store in stores]
    packed_tokens = [
        store.tokens_after(sinks) for store, sinks in zip(stores, skipped, strict=True)
    ]
    for store, sinks, packed in zip(stores, skipped, packed_tokens, strict=True):
        own_rows = rows if store is stores[-1] else nothing
        own = sparsity.part(packed, sum(packed_tokens)) if sparsity is not None else None
        count = packed if own is None else min(own.tokens(packed), packed)
        if count < packed:
            part = attend_selected(query, store, own_rows, scaling, sinks, own, count)
        else:
            held = (None, None) if store.outliers is None else store.outliers.held
            part = attend_store(query, store, own_rows, scaling, sinks, causal, held)
        attended.append(count)
        result = part if result is None else ops.merge(*result, *part)
    return *result, attended


def attend_store(
    query: Tensor,
    store: PackedStore,
    rows: ExactRows,
    scaling: float,
    sink_tokens: int,
    causal: bool,
    outliers: tuple[Tensor, Tensor] | tuple[None, None],
    token_slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to all packed tokens of a store and to exact rows; see :func:`svdq.ops.attend`."""
    return ops.attend(
        query,
        store.k_pages,
        store.v_pages,
        store.page_table,
        store.cache_seqlens,
        store.basis,
        store.scale,
        store.mean,
        store.layout,
        rows.keys,
        rows.values,
        rows.lens,
        scaling,
        store.inv_freq,
        store.first_position,
        sink_tokens,
        causal,
        store.post_mean,
        *outliers,
        token_slots,
    )


def attend_selected(
    query: Tensor,
    store: PackedStore,
    rows: ExactRows,
    scaling: float,
    sink_tokens: int,
    sparsity: Sparsity,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Attend to the ``budget`` best packed tokens of a store and to exact rows, [B, Hq, 1, D]."""
    slots, places = select(query, store, sparsity, budget, scaling, sink_tokens)
    pages = -(-slots.shape[2] // PAGE_TOKENS)
    slots = nn.functional.pad(slots, (0, pages * PAGE_TOKENS - slots.shape[2]), value=NO_SLOT)
    gathered = copy.copy(store)
    gathered.k_pages, gathered.v_pages = ops.gather(
        store.k_pages, store.v_pages, store.page_table, slots, store.layout
    )
    batch, device = query.shape[0], query.device
    table = torch.arange(batch * pages, dtype=torch.int32, device=device)
    gathered.page_table = table.view(batch, pages)
    gathered.cache_seqlens = torch.full_like(store.cache_seqlens, pages * PAGE_TOKENS)
    outliers = (None, None) if store.outliers is None else (places, store.outliers.keys)
    return attend_store(query, gathered, rows, scaling, 0, True, outliers, slots)
