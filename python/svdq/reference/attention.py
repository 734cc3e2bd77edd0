"""Keys in pages, and attention over pages and exact rows."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.layout import PageLayout
from svdq.reference.keys import _stored, code_keys, decode_keys
from svdq.reference.pages import unpack_codes, unpack_values, write_codes_

NO_SLOT = 2**31 - 1  # stands for no token in lists of slots


def pack_keys_(
    k_pages: Tensor,
    keys: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    inv_freq: Tensor | None = None,
    position: int = 0,
    post_mean: Tensor | None = None,
    errors: Tensor | None = None,
) -> None:
    """Project, quantize and store keys; see :func:`svdq.ops.pack_keys_`."""
    coder = (basis, scale, mean.double(), layout, inv_freq, position, post_mean)
    codes = code_keys(keys, *coder)
    write_codes_(k_pages, codes.long(), layout, page_table, slot)
    if errors is not None:
        errors.copy_((keys.double() - decode_keys(codes, *coder)).square().sum(-1))


def unpack_keys(
    k_pages: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    num_tokens: int,
    inv_freq: Tensor | None = None,
    position: int = 0,
    post_mean: Tensor | None = None,
) -> Tensor:
    """Decode keys and rotate them to their positions; see :func:`svdq.ops.unpack_keys`."""
    codes = unpack_codes(k_pages, layout, page_table, slot, num_tokens)
    return decode_keys(codes, basis, scale, mean, layout, inv_freq, position, post_mean)


def gathered_keys(
    k_pages: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    num_tokens: int,
    inv_freq: Tensor | None,
    positions: Tensor,
    post_mean: Tensor | None = None,
) -> Tensor:
    """As :func:`unpack_keys`, of tokens at ``positions`` [H, T]."""
    codes = unpack_codes(k_pages, layout, page_table, slot, num_tokens)
    coded = (codes, basis, scale, mean, layout, inv_freq)
    return torch.stack([decode_keys(*coded, own, post_mean)[h] for h, own in enumerate(positions)])


def append_window_(
    window_keys: Tensor, window_values: Tensor, keys: Tensor, values: Tensor, start: int
) -> None:
    """Copy new tokens into exact rows; see :func:`svdq.ops.append_window_`."""
    window_keys[:, start : start + keys.shape[1]] = keys
    window_values[:, start : start + values.shape[1]] = values


def attend_keys(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` [Hq, L, D] over keys, values [H, n, D] where ``visible``, [L, n] or
    [Hq, L, n]."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = (query.double() @ keys.mT * sm_scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    # A query that sees nothing has lse = -inf; its differences are NaN, its probabilities zero.
    probabilities = (scores - lse[..., None]).exp().nan_to_num(nan=0.0)
    return probabilities @ values, lse


def replace_keys(keys: Tensor, tokens: Tensor, exact: Tensor) -> Tensor:
    """``keys`` [H, n, D] with ``exact`` [H, N, D] at ``tokens`` [H, N], as far as there are any."""
    keys = keys.clone()
    for h, own in enumerate(tokens):
        inside = (own >= 0) & (own < keys.shape[1])
        keys[h, own[inside].long()] = exact[h, inside].to(keys.dtype)
    return keys


def visible_tokens(q_len: int, packed: int, exact: int, causal: bool) -> Tensor:
    """Which of the packed tokens and exact rows each query sees, [L, packed + exact]."""
    visible = torch.ones(q_len, packed + exact, dtype=torch.bool)
    if causal:  # query i is exact row exact - L + i and sees itself and what came before it
        visible[:, packed:] = visible[:, packed:].tril(exact - q_len)
    return visible


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
    """Decode everything, then attend; see :func:`svdq.ops.attend`."""
    results = []
    for b in range(query.shape[0]):
        packed = max(int(cache_seqlens[b]) - sink_tokens, 0)
        at = (layout, page_table[b], sink_tokens, packed)
        first = int(first_position[b]) if first_position is not None else 0
        tail = post_mean[b] if post_mean is not None else None
        fitted = (basis[b], scale[b], mean[b].double())
        if token_slots is None:
            k = unpack_keys(k_pages, *fitted, *at, inv_freq, sink_tokens + first, tail)
        else:
            positions = token_slots[b, :, :packed].long() + first
            k = gathered_keys(k_pages, *fitted, *at, inv_freq, positions, tail)
        if outlier_slots is not None:
            k = replace_keys(k, outlier_slots[b] - sink_tokens, outlier_keys[b])
        v = unpack_values(v_pages, *at)
        exact = int(window_lens[b])
        k = torch.cat([k.double(), window_keys[b, :, :exact].double()], dim=1)
        v = torch.cat([v.double(), window_values[b, :, :exact].double()], dim=1)
        visible = visible_tokens(query.shape[2], packed, exact, causal)
        if token_slots is not None:
            there = token_slots[b, :, :packed] < NO_SLOT
            group = query.shape[1] // k.shape[0]
            visible = visible.repeat(query.shape[1], 1, 1)
            visible[:, :, :packed] &= there.repeat_interleave(group, dim=0)[:, None]
            v = v.nan_to_num()  # of tokens that are not there
        results.append(attend_keys(query[b], k, v, visible, sm_scale))
    out, lse = (torch.stack(x) for x in zip(*results, strict=True))
    return out.to(query.dtype), _stored(lse, query)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys; see :func:`svdq.ops.merge`."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    # Where both sets are empty the weights are exp(-inf - -inf): nothing, so zeros.
    weights = [(x.double() - lse).exp().nan_to_num(nan=0.0)[..., None] for x in (lse_a, lse_b)]
    out = weights[0] * out_a.double() + weights[1] * out_b.double()
    return out.to(out_a.dtype), _stored(lse, lse_a)
