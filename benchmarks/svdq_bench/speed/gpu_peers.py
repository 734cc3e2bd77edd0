"""Attention kernels of other packages over full keys and values on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def find_peers() -> dict[str, Attend]:
    """Those that are installed by name, or FlashDecoding in Triton where none is.

    Each takes one query a head, [B, Hq, D], and contiguous keys and values, [B, H, T, D].
    """
    peers: dict[str, Attend] = {}
    if importlib.util.find_spec("flashinfer"):
        peers["flashinfer"] = _flashinfer
    if importlib.util.find_spec("flash_attn"):
        peers["flash-attn"] = _flash_attn
    if not peers and importlib.util.find_spec("triton"):
        from svdq_bench.speed.split_kv import split_kv_attention

        peers["Triton split-KV"] = split_kv_attention
    return peers


def peer_call(
    attend: Attend, layers: Sequence[Sequence[Tensor]], num_qo_heads: int
) -> Callable[[int], Tensor]:
    """One call over the copy of keys and values that a round asks for."""
    keys = layers[0][0]
    size = (keys.shape[0], num_qo_heads, keys.shape[3])
    query = torch.randn(size, device=keys.device).to(keys.dtype)
    return lambda index: attend(query, *layers[index % len(layers)])


def _flashinfer(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from flashinfer import single_decode_with_kv_cache

    rows = zip(query, keys, values, strict=True)
    return torch.stack([single_decode_with_kv_cache(*row, kv_layout="HND") for row in rows])


def _flash_attn(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    return flash_attn_with_kvcache(query[:, None], keys, values)[:, 0]
