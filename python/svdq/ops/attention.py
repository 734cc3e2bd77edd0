"""Operators that select, gather, attend and merge."""

from __future__ import annotations

from torch import Tensor

from svdq.layout import PageLayout
from svdq.ops import registered


def select(
    query: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    budget: int,
    sm_scale: float,
    inv_freq: Tensor | None = None,
    first_position: Tensor | None = None,
    sink_tokens: int = 0,
    post_mean: Tensor | None = None,
    outlier_slots: Tensor | None = None,
    channels: int = 16,
) -> tuple[Tensor, Tensor]:
    """Choose the packed tokens that matter to a query, from a few channels of their codes.

    The queries of a KV head's group share one choice. Each scores every token by the head's first
    ``channels`` channels, rotated as if the token stood in the middle of its page, without the RoPE
    pairs that turn more than one radian on the way there. A token's weight is the sum of its
    probabilities over the queries, relative to a sample of at most 64 pages; the ``budget`` tokens
    of largest weight are selected, the earlier one of equals, and all outliers with them.

    Parameters
    ----------
    query .. layout, sm_scale, inv_freq, first_position, sink_tokens, post_mean, outlier_slots : as
        for :func:`attend`; sinks are never selected.
    budget : tokens to select per KV head beside the outliers, at least 1.
    channels : leading channels that score, a multiple of 4 up to 32.

    Returns
    -------
    slots : [B, H, budget + N] int32, ascending, then 2^31 - 1 where there are no more tokens.
    outlier_indices : [B, H, N] int32, place of each outlier in ``slots``, 2^31 - 1 for none.
    """
    return registered.OPERATORS.select(
        query,
        k_pages,
        page_table,
        cache_seqlens,
        basis,
        scale,
        mean,
        layout.ints,
        inv_freq,
        first_position,
        sink_tokens,
        sm_scale,
        budget,
        channels,
        post_mean,
        outlier_slots,
    )


def gather(
    k_pages: Tensor, v_pages: Tensor, page_table: Tensor, slots: Tensor, layout: PageLayout
) -> tuple[Tensor, Tensor]:
    """Copy the codes of some tokens of each head, keys and values, into pages of their own.

    Token i of head h in the new pages is slot ``slots[b, h, i]`` of sequence b, whose pages are
    rows ``b * ceil(M / 64)`` and on. Nothing is decoded.

    Parameters
    ----------
    k_pages, v_pages, page_table : as for :func:`attend`.
    slots : [B, H, M] int32, slots that are packed, or 2^31 - 1, which becomes zeros.

    Returns
    -------
    k_pages, v_pages : [B * ceil(M / 64), ...] like the pools.
    """
    return registered.OPERATORS.gather(k_pages, v_pages, page_table, slots, layout.ints)


def attend(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    window_keys: Tensor,
    window_values: Tensor,
    window_lens: Tensor,
    sm_scale: float,
    inv_freq: Tensor | None = None,
    first_position: Tensor | None = None,
    sink_tokens: int = 0,
    causal: bool = True,
    post_mean: Tensor | None = None,
    outlier_slots: Tensor | None = None,
    outlier_keys: Tensor | None = None,
    token_slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over packed pages and exact rows, dequantizing in registers.

    Sequence b's keys are the packed slots ``sink_tokens .. cache_seqlens[b] - 1`` and the exact
    rows ``0 .. window_lens[b] - 1`` (attention sinks, then the window, then the new tokens
    themselves). With ``causal`` the L queries are the last L exact rows: query i sees exact rows up
    to ``window_lens[b] - L + i``. All packed slots are visible to every query. A query that sees
    nothing gets zeros and ``lse = -inf``. Outliers are packed slots whose keys are held exact too:
    their scores are those of the exact keys, their values the packed ones.

    Parameters
    ----------
    query : [B, Hq, L, D] float32, bfloat16 or float16, rotated; Hq a multiple of H.
    k_pages, v_pages : pools as for :func:`pack_keys_` and :func:`pack_values_`.
    page_table : [B, N] int32, page of each 64 slots; ``64 * N >= max(cache_seqlens)``.
    cache_seqlens : [B] int32, packed slots of each sequence.
    basis, scale, mean : [B, R, D] bfloat16, [B, R] float32, [B, H, D] float32.
    window_keys, window_values : [B, H, E, D] float32, bfloat16 or float16, rotated keys.
    window_lens : [B] int32, at most E.
    sm_scale : softmax scale, usually ``D ** -0.5``.
    inv_freq : as for :func:`fit_basis`; needed where the layout says ``"pre"`` or ``"hybrid"``.
    first_position : [B] int32, position of slot 0 of each sequence (None: zeros).
    sink_tokens : leading slots that are held as exact rows and skipped here.
    post_mean : [B, H, D] float32, for hybrid layouts alone.
    outlier_slots : [B, H, N] int32, contiguous; a head's outliers, ascending, then 2^31 - 1.
    outlier_keys : [B, H, N, D] float32, bfloat16 or float16, contiguous; rotated keys.
    token_slots : [B, H, 64 * N] int32, contiguous, for pages of :func:`gather`: the slot that each
        token came from, 2^31 - 1 for none. ``outlier_slots`` are then places in it, and
        ``sink_tokens`` must be 0.

    Returns
    -------
    out : [B, Hq, L, D] in the query's dtype.
    lse : [B, Hq, L] float32, natural logarithm of the sum of exponentials of the scaled scores.
    """
    return registered.OPERATORS.attend(
        query,
        k_pages,
        v_pages,
        page_table,
        cache_seqlens,
        basis,
        scale,
        mean,
        layout.ints,
        inv_freq,
        first_position,
        window_keys,
        window_values,
        window_lens,
        sink_tokens,
        sm_scale,
        causal,
        post_mean,
        outlier_slots,
        outlier_keys,
        token_slots,
    )


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys.

    Parameters
    ----------
    out_a, out_b : [B, Hq, L, D] of one dtype.
    lse_a, lse_b : [B, Hq, L] float32, natural logarithm.

    Returns
    -------
    out, lse : attention over the union; zeros and -inf where both are empty.
    """
    return registered.OPERATORS.merge(out_a, lse_a, out_b, lse_b)
