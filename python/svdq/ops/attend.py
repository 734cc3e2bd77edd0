"""Operators that select, gather, attend and merge."""

from __future__ import annotations

from torch import Tensor

from svdq.ops.nouns import NO_RULES, LogitRules, PackedKeys, Window
from svdq.ops.registered import call


def select(
    query: Tensor, packed: PackedKeys, budget: int, sm_scale: float, *, channels: int = 16
) -> tuple[Tensor, Tensor]:
    """Choose the packed tokens that matter to a query, from a few channels of their codes.

    The queries of a KV head's group share one choice. Each scores every token by the head's first
    ``channels`` channels (its proxy), rotated as if the token stood in the middle of its page,
    without the RoPE pairs that rotate by more than one radian on the way there. The mass of a token
    is the sum of its probabilities over the queries, relative to a sample of at most 64 pages. The
    ``budget`` tokens of largest mass are selected, the earlier one of equals, and all outliers in
    addition.

    Parameters
    ----------
    query : [B, Hq, L, D] float32, bfloat16 or float16, rotated; Hq a multiple of H.
    packed : the tokens to choose from; sinks are never selected.
    budget : tokens to select per KV head in addition to the outliers, at least 1.
    sm_scale : softmax scale, usually ``D ** -0.5``.
    channels : proxy channels, a multiple of 4 up to 32.

    Returns
    -------
    slots : [B, H, budget + N] int32, ascending, then ``NO_SLOT`` where there are no more tokens.
    outlier_indices : [B, H, N] int32, index of each outlier in ``slots``, ``NO_SLOT`` for none.
    """
    return call("select", packed, query=query, budget=budget, sm_scale=sm_scale, channels=channels)


def gather(packed: PackedKeys, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copy the codes of some tokens of each head, keys and values, into pages of their own.

    Token i of head h in the new pages is slot ``slots[b, h, i]`` of sequence b, whose pages are
    rows ``b * ceil(M / 64)`` and on. Nothing is decoded.

    Parameters
    ----------
    packed : the tokens to copy from.
    slots : [B, H, M] int32, slots that are packed, or ``NO_SLOT``, which becomes zeros.

    Returns
    -------
    k_pages, v_pages : [B * ceil(M / 64), ...] like the pools.
    """
    return call("gather", packed, slots=slots)


def attend(
    query: Tensor,
    packed: PackedKeys,
    window: Window,
    sm_scale: float,
    *,
    causal: bool = True,
    rules: LogitRules = NO_RULES,
    query_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over packed pages and the window, dequantizing in registers.

    The keys of sequence b are the packed slots ``sink_tokens .. cache_seqlens[b] - 1`` and the
    window's tokens ``0 .. lens[b] - 1``. With ``causal`` the L queries are the last L tokens of the
    window: query i sees its tokens up to ``lens[b] - L + i``. All packed slots are visible to every
    query. A query that sees nothing gets zeros and ``lse = -inf``. Outliers are scored by their
    exact keys and averaged by their packed values.

    With ``rules.window_size`` tokens have positions: slot s has ``first_position[b] + s``, query i
    ``query_position[b] + i``. The first ``sink_tokens`` of the window's tokens are slots 0 and on,
    those after them end with the last query where ``causal``, else just before the first.

    Learned sinks (``rules.sinks``) belong to the softmax and so to ``lse``; a query that sees
    nothing gets zeros and its head's sink as ``lse``. Where parts are merged, give them to one
    part.

    Parameters
    ----------
    query : [B, Hq, L, D] float32, bfloat16 or float16, rotated; Hq a multiple of H.
    packed : packed tokens, with values.
    window : uncompressed tokens.
    sm_scale : softmax scale, usually ``D ** -0.5``.
    causal : whether queries see the window causally.
    rules : softcap, learned sinks and sliding window.
    query_position : [B] int32, contiguous; position of the first query of each sequence, needed
        with ``rules.window_size``.

    Returns
    -------
    out : [B, Hq, L, D] in the query's dtype.
    lse : [B, Hq, L] float32, natural logarithm of the sum of exponentials of the scaled and capped
        scores, and of the sink.
    """
    return call(
        "attend",
        packed,
        window,
        rules,
        query=query,
        sm_scale=sm_scale,
        causal=causal,
        query_position=query_position,
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
    return call("merge", out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
