"""Attention over all that a layer holds: stores of packed tokens one after another, exact rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdq import ops
from svdq.storage import ExactRows, PackedStore


def attend_stores(
    query: Tensor,
    stores: Sequence[PackedStore],
    rows: ExactRows,
    scaling: float,
    sink_tokens: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attend over packed stores in their order and the exact rows that follow them.

    Every store has a basis of its own, so it is a call of its own, and the parts are merged.

    Parameters
    ----------
    query : [B, Hq, L, D].
    stores : at least one; the first holds the sinks.
    rows, scaling, sink_tokens, causal : as for :func:`svdq.ops.attend`.

    Returns
    -------
    out, lse : as of :func:`svdq.ops.attend`.
    """
    nothing = (rows.keys[:, :, :0], rows.values[:, :, :0], torch.zeros_like(rows.lens))
    result = None
    for store in stores:
        last = store is stores[-1]
        part = ops.attend(
            query,
            store.k_pages,
            store.v_pages,
            store.page_table,
            store.cache_seqlens,
            store.basis,
            store.scale,
            store.mean,
            store.layout,
            *((rows.keys, rows.values, rows.lens) if last else nothing),
            scaling,
            store.inv_freq,
            store.first_position,
            sink_tokens if store is stores[0] else 0,
            causal and last,
            store.tail_mean,
            *((None, None) if store.outliers is None else store.outliers.held),
        )
        result = part if result is None else ops.merge(*result, *part)
    return result
