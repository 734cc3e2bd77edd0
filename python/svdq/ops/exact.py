"""Attention over uncompressed keys where PyTorch's own kernels will not do: softcap, learned sinks,
sliding windows."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.ops.nouns import LogitRules

PIECE_SCORES = 1 << 24  # float32 scores held at once; one query of a KV head's may be more


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Logits after a softcap; 0 for none."""
    return softcap * (logits / softcap).tanh() if softcap else logits


def exact_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sm_scale: float,
    rules: LogitRules,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention in float32 by pieces of the queries, so that memory stays bounded.

    Without a mask, queries are the last L tokens where ``causal``, and the L tokens after the last
    otherwise; they see all tokens up to their own in their sliding window.

    Parameters
    ----------
    query : [B, Hq, L, D].
    keys, values : [B, H, T, D], Hq a multiple of H.
    sm_scale : softmax scale.
    rules : softcap, learned sinks and sliding window.
    mask : [B or 1, Hq or 1, L, T] bool, True where a query sees a token, or a float to add to the
        logits; it stands for causality and sliding window, which are not looked at then.
    causal : see above.

    Returns
    -------
    out : [B, Hq, L, D] in the query's dtype; zeros where a query sees nothing.
    lse : [B, Hq, L] float32, natural logarithm, of the sinks too.
    """
    batch, heads, length, _ = query.shape
    kv_heads, total = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    out = values.new_empty((batch, heads, length, values.shape[3]), dtype=query.dtype)
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    each = kv_heads if query.numel() // query.shape[3] * total <= PIECE_SCORES else 1
    rows = max(PIECE_SCORES // max(batch * group * each * total, 1), 1)
    start = total - length if causal else total  # token of the first query
    for head in range(0, kv_heads, each):
        for row in range(0, length, rows):
            end = min(row + rows, length)
            # Tokens that some query of the piece sees.
            first, last = 0, total
            if mask is None:
                last = max(min(start + end, total), 0)
                if rules.window_size:
                    first = min(max(start + row - rules.window_size + 1, 0), last)
            at = (slice(None), slice(head * group, (head + each) * group), slice(row, end))
            own = slice(head, head + each), slice(first, last)
            seen = piece_mask(mask, at[1:], start, (first, last), rules.window_size, query.device)
            out[at], lse[at] = _attend_piece(
                query[at],
                keys[:, own[0], own[1]],
                values[:, own[0], own[1]],
                sm_scale,
                seen,
                LogitRules(rules.softcap, None if rules.sinks is None else rules.sinks[at[1]]),
            )
    return out, lse


def piece_mask(
    mask: Tensor | None,
    at: tuple[slice, slice],
    start: int,
    tokens: tuple[int, int],
    window_size: int,
    device: torch.device,
) -> Tensor:
    """The mask of some heads and queries (``at``) over some tokens, made where none is given."""
    heads, rows = at
    if mask is not None:
        return mask[:, heads if mask.shape[1] > 1 else slice(None), rows, slice(*tokens)]
    own = start + torch.arange(rows.start, rows.stop, device=device)[:, None]
    slots = torch.arange(*tokens, device=device)
    seen = slots <= own
    if window_size:
        seen &= slots > own - window_size
    return seen[None, None]


def _attend_piece(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sm_scale: float,
    mask: Tensor,
    rules: LogitRules,
) -> tuple[Tensor, Tensor]:
    """One piece: [B, Hq, L, D] over [B, H, T, D] with its mask and its heads' sinks."""
    grouped = query.float().unflatten(1, (keys.shape[1], -1))  # [B, H, g, L, D]
    logits = (grouped.flatten(2, 3) @ keys.float().mT * sm_scale).view(*grouped.shape[:4], -1)
    logits = capped(logits.flatten(1, 2), rules.softcap)  # [B, Hq, L, T]
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    lse = logits.logsumexp(dim=-1)
    if rules.sinks is not None:
        lse = torch.logaddexp(lse, rules.sinks.float()[:, None])
    # Where a query sees nothing both are -inf; any finite number makes its probabilities zero.
    probabilities = (logits - lse.clamp(min=torch.finfo().min)[..., None]).exp()
    spread = probabilities.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B, H, g * L, T]
    out = (spread @ values.float()).view(*grouped.shape[:4], -1).flatten(1, 2)
    return out.to(query.dtype), lse
