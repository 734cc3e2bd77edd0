"""Attention over everything that a layer holds: its packed stores in order, then the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from svdq import ops
from svdq.config.sparsity import Sparsity
from svdq.layout import NO_SLOT, PAGE_TOKENS, pages_of
from svdq.ops import NO_RULES, LogitRules, PackedKeys
from svdq.store.packed import PackedStore
from svdq.store.window import WindowStore


def attend_stores(
    query: Tensor,
    stores: Sequence[PackedStore],
    window: WindowStore,
    sm_scale: float,
    *,
    sink_tokens: int,
    causal: bool,
    sparsity: Sparsity | None = None,
    rules: LogitRules = NO_RULES,
    query_position: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[int]]:
    """Attend over packed stores in their order and the window that follows them.

    Every store has a basis of its own, so it is a call of its own, and the parts are merged. The
    first takes the window, whose first tokens are its sinks, and the learned sinks.

    Parameters
    ----------
    query : [B, Hq, L, D].
    stores : at least one; the first holds the sinks.
    window, sm_scale, sink_tokens, causal, query_position : as for :func:`svdq.ops.attend`.
    sparsity : how to choose the packed tokens to attend to, for single queries alone; None for all
        of them.
    rules : softcap, learned sinks and sliding window; with ``sparsity`` sinks alone.

    Returns
    -------
    out, lse : as of :func:`svdq.ops.attend`.
    attended : packed tokens of each store that a KV head attended to, without the sinks, in the
        longest sequence.
    """
    result, attended = None, []
    sinks_of = [sink_tokens if store is stores[0] else 0 for store in stores]
    sizes = [store.tokens_after(sinks) for store, sinks in zip(stores, sinks_of, strict=True)]
    for store, sinks, size in zip(stores, sinks_of, sizes, strict=True):
        is_first = store is stores[0]
        own_window = window.window if is_first else window.empty_window
        own_rules = rules if is_first else rules.without_sinks()
        own = sparsity.part(size, sum(sizes)) if sparsity is not None else None
        count = size if own is None else min(own.tokens(size), size)
        packed = store.packed_keys(sinks)
        if count < size:
            slots, indices = select_tokens(query, store, own, count, sm_scale, sinks)
            packed = gathered(packed, slots, indices)
        part = ops.attend(
            query,
            packed,
            own_window,
            sm_scale,
            causal=causal,
            rules=own_rules,
            query_position=query_position,
        )
        attended.append(count)
        result = part if result is None else ops.merge(*result, *part)
    return *result, attended


def select_tokens(
    query: Tensor,
    store: PackedStore,
    sparsity: Sparsity,
    budget: int,
    sm_scale: float,
    sink_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Slots [B, H, M] that a step attends to, and the indices of outliers among them.

    Parameters
    ----------
    query : [B, Hq, 1, D].
    store : packed tokens.
    sparsity, budget : how to choose, and how many tokens of a KV head.
    sm_scale : softmax scale.
    sink_tokens : leading slots that are in the window.

    Returns
    -------
    slots, outlier_indices : see :func:`svdq.ops.select`.
    """
    packed = store.packed_keys(sink_tokens)
    if sparsity.scorer == "landmarks":
        return store.landmarks.select(query, packed, store.slots, budget, sm_scale)
    return ops.select(query, packed, budget, sm_scale, channels=sparsity.channels)


def gathered(packed: PackedKeys, slots: Tensor, outlier_indices: Tensor) -> PackedKeys:
    """The packed tokens at these slots [B, H, M] alone, in pages of their own; no sinks."""
    batch, _, count = slots.shape
    pages = pages_of(count)
    slots = nn.functional.pad(slots, (0, pages * PAGE_TOKENS - count), value=NO_SLOT)
    k_pages, v_pages = ops.gather(packed, slots)
    table = torch.arange(batch * pages, dtype=torch.int32, device=slots.device)
    return replace(
        packed,
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=table.view(batch, pages),
        cache_seqlens=torch.full_like(packed.cache_seqlens, pages * PAGE_TOKENS),
        outlier_slots=None if packed.outlier_keys is None else outlier_indices,
        token_slots=slots,
    )
