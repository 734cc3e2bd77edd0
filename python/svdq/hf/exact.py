"""Attention over exact keys and values with PyTorch's own kernels, as transformers calls them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def exact_attention(
    module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> Tensor:
    """Causal attention of the last L of T tokens, exactly as transformers' ``"sdpa"`` computes it.

    Parameters
    ----------
    module : the attention module; its ``num_key_value_groups`` says how heads are shared.
    query : [B, Hq, L, D], the queries of the last L tokens.
    keys, values : [B, H, T, D].
    scaling : softmax scale.

    Returns
    -------
    out : [B, L, Hq, D].
    """
    length, total = query.shape[2], keys.shape[2]
    mask = None
    if 1 < length < total:
        mask = query.new_ones((length, total), dtype=torch.bool).tril(total - length)[None, None]
    out, _ = sdpa_attention_forward(
        module, query, keys, values, mask, dropout=0.0, scaling=scaling, is_causal=length == total
    )
    return out


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    spans: list[tuple[int, int]],
) -> Tensor:
    """:func:`exact_attention` where ``spans[b]`` are the first and last row + 1 of sequence b.

    Where a sequence has fewer tokens than there are queries, the first queries are padding and get
    zeros.
    """
    if len(set(spans)) == 1:
        start, stop = spans[0]
        if stop - start >= query.shape[2]:
            keys, values = keys[:, :, start:stop], values[:, :, start:stop]
            return exact_attention(module, query, keys, values, scaling)
    batch, heads, length, dim = query.shape
    out = query.new_zeros((batch, length, heads, dim))
    for b, (start, stop) in enumerate(spans):
        first = max(length - (stop - start), 0)
        out[b : b + 1, first:] = exact_attention(
            module,
            query[b : b + 1, :, first:],
            keys[b : b + 1, :, start:stop],
            values[b : b + 1, :, start:stop],
            scaling,
        )
    return out


def causal_attention_with_lse(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of tokens among themselves, with the log-sum-exp that merging needs.

    Parameters
    ----------
    query : [B, Hq, L, D].
    keys, values : [B, H, L, D], Hq a multiple of H.
    scaling : softmax scale.

    Returns
    -------
    out : [B, Hq, L, D].
    lse : [B, Hq, L] float32, natural logarithm.
    """
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    # scaled_dot_product_attention drops the log-sum-exp; this is the kernel it calls on a CPU.
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, True, scale=scaling
    )
