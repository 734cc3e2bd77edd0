"""Attention over all that a layer holds: stores of packed tokens one after another, exact rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from svdq import ops
from svdq.sparsity import Sparsity, attend_selected
from svdq.storage import ExactRows, PackedStore


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
        max(max(store.slots) - sinks, 0) for store, sinks in zip(stores, skipped, strict=True)
    ]
    for store, sinks, packed in zip(stores, skipped, packed_tokens, strict=True):
        own_rows = rows if store is stores[-1] else nothing
        own = sparsity.part(packed, sum(packed_tokens)) if sparsity is not None else None
        if own is not None and own.tokens(packed) < packed:
            *part, count = attend_selected(query, store, own_rows, own, scaling, sinks)
        else:
            part, count = _attend_all(query, store, own_rows, scaling, sinks, causal), packed
        attended.append(count)
        result = part if result is None else ops.merge(*result, *part)
    return *result, attended


def _attend_all(
    query: Tensor,
    store: PackedStore,
    rows: ExactRows,
    scaling: float,
    sink_tokens: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
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
        store.tail_mean,
        *((None, None) if store.outliers is None else store.outliers.held),
    )
