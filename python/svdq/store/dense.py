"""Attention over uncompressed keys and values with PyTorch's own kernels, as transformers calls
them, and in pieces where a model asks for what those kernels do not know."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from svdq.ops import NO_RULES, LogitRules
from svdq.ops.exact import exact_attention


def dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, sm_scale: float, rules: LogitRules = NO_RULES
) -> Tensor:
    """Causal attention of the last L of T tokens, exactly as transformers' ``"sdpa"`` computes it.

    Parameters
    ----------
    query : [B, Hq, L, D], the queries of the last L tokens; Hq a multiple of H.
    keys, values : [B, H, T, D].
    sm_scale : softmax scale.
    rules : softcap, learned sinks and sliding window.

    Returns
    -------
    out : [B, L, Hq, D].
    """
    if rules:
        return exact_attention(query, keys, values, sm_scale, rules)[0].transpose(1, 2)
    length, total = query.shape[2], keys.shape[2]
    mask = None
    if 1 < length < total:
        mask = query.new_ones((length, total), dtype=torch.bool).tril(total - length)[None, None]
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // keys.shape[1])
    out, _ = sdpa_attention_forward(
        module, query, keys, values, mask, dropout=0.0, scaling=sm_scale, is_causal=length == total
    )
    return out


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sm_scale: float,
    spans: list[tuple[int, int]],
    rules: LogitRules = NO_RULES,
) -> Tensor:
    """:func:`dense_attention` to the tokens ``spans[b][0] .. spans[b][1] - 1`` of sequence b.

    Where a sequence has fewer tokens than there are queries, the first queries are padding and get
    zeros.
    """
    if len(set(spans)) == 1:
        start, stop = spans[0]
        if stop - start >= query.shape[2]:
            return dense_attention(
                query, keys[:, :, start:stop], values[:, :, start:stop], sm_scale, rules
            )
    batch, heads, length, dim = query.shape
    out = query.new_zeros((batch, length, heads, dim))
    for b, (start, stop) in enumerate(spans):
        first = max(length - (stop - start), 0)
        if first == length:
            continue
        out[b : b + 1, first:] = dense_attention(
            query[b : b + 1, :, first:],
            keys[b : b + 1, :, start:stop],
            values[b : b + 1, :, start:stop],
            sm_scale,
            rules,
        )
    return out


def masked_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sm_scale: float,
    mask: Tensor,
    padding: list[int],
    rules: LogitRules = NO_RULES,
) -> Tensor:
    """Attention by a mask of the model's own, which stands for causality and sliding windows.

    Parameters
    ----------
    query : [B, Hq, L, D], of the last L tokens.
    keys, values : [B, H, T, D].
    mask : [B or 1, 1 or Hq, L, T] bool, or a float to add to the scores.
    padding : left padding of each sequence, where the result is zero.

    Returns
    -------
    out : [B, L, Hq, D].
    """
    if mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if rules:
        rules = replace(rules, window_size=0)
        out = exact_attention(query, keys, values, sm_scale, rules, mask=mask)[0].transpose(1, 2)
    else:
        module = SimpleNamespace(num_key_value_groups=query.shape[1] // keys.shape[1])
        out, _ = sdpa_attention_forward(
            module, query, keys, values, mask, dropout=0.0, scaling=sm_scale, is_causal=False
        )
    own = torch.arange(keys.shape[2] - query.shape[2], keys.shape[2])
    hidden = own < torch.tensor(padding)[:, None]
    return out.masked_fill(hidden.to(out.device)[:, :, None, None], 0)


def causal_attention_with_lse(
    query: Tensor, keys: Tensor, values: Tensor, sm_scale: float, rules: LogitRules = NO_RULES
) -> tuple[Tensor, Tensor]:
    """Causal attention of tokens among themselves, with the log-sum-exp that merging needs.

    Parameters
    ----------
    query : [B, Hq, L, D].
    keys, values : [B, H, L, D], Hq a multiple of H.
    sm_scale : softmax scale.
    rules : softcap, learned sinks and sliding window.

    Returns
    -------
    out : [B, Hq, L, D].
    lse : [B, Hq, L] float32, natural logarithm.
    """
    if rules:
        return exact_attention(query, keys, values, sm_scale, rules)
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    # scaled_dot_product_attention drops the log-sum-exp; this is the kernel it calls on a CPU.
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, True, scale=sm_scale
    )
