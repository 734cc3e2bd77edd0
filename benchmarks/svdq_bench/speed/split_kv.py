"""Decoding over full keys and values in Triton: FlashDecoding's splits of the context.

A baseline for GPUs where no package of attention kernels is installed. Every program takes one KV
head and one split of its tokens, with the query heads of the KV head as rows, and a second kernel
merges the splits (Dao et al., Flash-Decoding, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(64)  # tokens that are scored at once
PROGRAMS_PER_SM = 4


@triton.jit
def _split_kernel(
    query, keys, values, parts, kv_len, split_len, group: tl.constexpr, dim: tl.constexpr
):  # fmt: skip
    """Attention of a KV head's query rows to one split: parts [B * Hq, S, D + 1], the last lse."""
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    rows: tl.constexpr = max(triton.next_power_of_2(group), 16)
    row, d, t = tl.arange(0, rows), tl.arange(0, dim), tl.arange(0, BLOCK)
    real = row < group
    q_rows = head * group + row
    q = tl.load(query + q_rows[:, None] * dim + d[None, :], mask=real[:, None], other=0.0)
    best = tl.full((rows,), -float("inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    sums = tl.zeros((rows, dim), tl.float32)
    first = split * split_len
    last = tl.minimum(first + split_len, kv_len)
    for start in range(first, last, BLOCK):
        token = start + t
        inside = token < last
        at = (head.to(tl.int64) * kv_len + token[:, None]) * dim + d[None, :]
        k = tl.load(keys + at, mask=inside[:, None], other=0.0)
        v = tl.load(values + at, mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k)) * (dim**-0.5)
        score = tl.where(inside[None, :], score, -float("inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        shrink = tl.exp(best - new_best)
        p = tl.exp(score - new_best[:, None])
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        best = new_best
    to = parts + (q_rows * splits + split) * (dim + 1)
    tl.store(to[:, None] + d[None, :], sums / total[:, None], mask=real[:, None])
    tl.store(to + dim, best + tl.log(total), mask=real)


@triton.jit
def _merge_kernel(parts, out, splits, dim: tl.constexpr, most: tl.constexpr):
    """Merge a row's splits: out [B * Hq, D]."""
    row = tl.program_id(0)
    s, d = tl.arange(0, most), tl.arange(0, dim)
    own = parts + (row * splits + s) * (dim + 1)
    weight = tl.load(own + dim, mask=s < splits, other=-float("inf"))
    weight = tl.exp(weight - tl.max(weight, 0))
    part = tl.load(own[:, None] + d[None, :], mask=(s < splits)[:, None], other=0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * dim + d, merged.to(out.dtype.element_ty))


def split_kv_attention(query: Tensor, keys: Tensor, values: Tensor, splits: int = 0) -> Tensor:
    """Attention of one query a head over contiguous keys and values.

    Parameters
    ----------
    query : [B, Hq, D] bfloat16 or float16, D a power of two.
    keys, values : [B, H, T, D] of the same dtype, contiguous, Hq a multiple of H.
    splits : of the tokens; 0 for as many as keep the device busy.

    Returns
    -------
    out : [B, Hq, D].
    """
    (batch, q_heads, dim), (heads, kv_len) = query.shape, keys.shape[1:3]
    if not splits:
        sms = 1
        if query.is_cuda:
            sms = torch.cuda.get_device_properties(query.device).multi_processor_count
        splits = max(PROGRAMS_PER_SM * sms // (batch * heads), 1)
    blocks = triton.cdiv(kv_len, BLOCK.value)
    split_len = triton.cdiv(blocks, splits) * BLOCK.value
    splits = triton.cdiv(kv_len, split_len)
    parts = query.new_empty((batch * q_heads, splits, dim + 1), dtype=torch.float32)
    out = torch.empty_like(query)
    _split_kernel[(batch * heads, splits)](
        query, keys, values, parts, kv_len, split_len, q_heads // heads, dim
    )
    _merge_kernel[(batch * q_heads,)](parts, out, splits, dim, triton.next_power_of_2(splits))
    return out
