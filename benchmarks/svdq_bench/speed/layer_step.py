"""The time of a decode step of one small layer with a full cache."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F


def layer_step_ms(dtype: str, tokens: int = 4096, repeats: int = 5) -> float:
    """Best time of one decode step of a small layer with a full cache, as transformers computes it.

    Parameters
    ----------
    dtype : name of a torch dtype.
    tokens : of the cache; 9 query and 3 KV heads of 64, 3.5 million weights.
    """
    number = getattr(torch, dtype)
    query, weights = torch.randn(1, 9, 1, 64, dtype=number), torch.randn(6144, 576, dtype=number)
    keys, values = torch.randn(2, 1, 3, tokens, 64, dtype=number)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(1 + repeats):
            start = time.perf_counter()
            F.linear(query.flatten()[None], weights)
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            best = min(best, time.perf_counter() - start)
    return 1e3 * best
