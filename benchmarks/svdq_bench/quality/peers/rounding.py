"""Codes with a range from minimum to maximum, their bytes, and the checks of settings."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_bench.quality.key_memory import KeyMemory

SCALE_PAIR_BYTES = 4


def round_to_range(x: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize with one range along the last but one dimension, from min to max.

    Scale and minimum are rounded to float16, as they are stored.

    Parameters
    ----------
    x : [..., n, D]; D channels of n numbers each share a range.
    """
    numbers = x.float()
    low = numbers.amin(dim=-2, keepdim=True).half().float()
    high = numbers.amax(dim=-2, keepdim=True)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float()
    if not bool(low.isfinite().all() & scale.isfinite().all()):
        raise ValueError("there are numbers that are not within the range of float16")
    codes = ((numbers - low) / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return (codes.clamp(0, top) * scale + low).to(x.dtype)


def code_memory(
    shape: tuple[int, int, int], itemsize: int, coded: int, bits: int, pair_bytes: int
) -> KeyMemory:
    """Codes of ``coded`` tokens, their scale pairs, and the other tokens exact."""
    heads, tokens, dim = shape
    code_bits = heads * coded * dim * bits
    exact_bytes = heads * (tokens - coded) * dim * itemsize
    key_bytes = -(-code_bits // 8) + pair_bytes + exact_bytes
    return KeyMemory(code_bits, heads * coded * dim, key_bytes, heads * tokens * dim)


def check_bits(bits: int, name: str = "bits") -> None:
    if bits not in range(1, 9):
        raise ValueError(f"{name} must be 1 .. 8, got {bits}")


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")


def check_coded(label: str, tokens: int, coded: int) -> None:
    if coded < 1:
        raise ValueError(f"{label}: nothing is coded of {tokens} tokens, the exact ones are all")
