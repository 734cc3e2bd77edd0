"""The shape of a decode step that benchmarks time, and keys and pages for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq.config.bands import scheduled_bands
from svdq.layout import PageLayout

PRE_CHANNELS = 8  # of rope="hybrid"


@dataclass(frozen=True)
class Shape:
    """One decode step of one layer.

    Parameters
    ----------
    num_qo_heads, num_kv_heads, head_dim : heads and their size.
    kv_len : tokens in the cache, all of them seen by the query.
    sink_tokens, residual_length : tokens of them that are held exact, first and last.
    rope_theta : base of the rotary frequencies; the larger, the fewer pairs are fast, whose keys
        have to be reconstructed before RoPE.
    batch : sequences, each of ``kv_len`` tokens.
    """

    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    kv_len: int = 32768
    sink_tokens: int = 8
    residual_length: int = 64
    rope_theta: float = 5e5
    batch: int = 1

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_qo_heads % self.num_kv_heads:
            raise ValueError(
                "num_qo_heads must be a multiple of num_kv_heads, got "
                f"{self.num_qo_heads} and {self.num_kv_heads}"
            )
        if self.kv_len <= self.sink_tokens + self.residual_length:
            raise ValueError(
                f"kv_len must exceed the exact tokens, {self.sink_tokens} + "
                f"{self.residual_length}, got {self.kv_len}"
            )

    @property
    def inv_freq(self) -> Tensor:
        """Rotary frequencies [head_dim / 2] float32."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32)
        return 1.0 / self.rope_theta ** (pairs / self.head_dim)

    @property
    def packed_tokens(self) -> int:
        """Slots in packed pages (the sinks' slots among them)."""
        return self.kv_len - self.residual_length


def synthetic_keys(shape: Shape, seed: int = 0, device: str = "cpu") -> Tensor:
    """Keys whose latent channels decay as a model's do: [H, packed_tokens, D] float32."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, tokens, dim = shape.num_kv_heads, shape.packed_tokens, shape.head_dim

    def normal(*size: int) -> Tensor:
        return torch.randn(heads, *size, generator=generator, device=device)

    latent = normal(tokens, dim) * torch.exp(torch.arange(dim, device=device) * (-8.0 / dim))
    basis, _ = torch.linalg.qr(normal(dim, dim))
    return latent @ basis.mT + normal(1, dim)


def page_layout(shape: Shape, schedule: Sequence[int], rope: str, v_bits: int) -> PageLayout:
    """Layout of the pages to attend over; ``ValueError`` for shapes that pages cannot have."""
    dim, heads = shape.head_dim, shape.num_kv_heads
    hybrid = rope in ("hybrid", "rotated-mean")
    pre, post = scheduled_bands(dim, schedule, PRE_CHANNELS if rope == "hybrid" else 0)
    return PageLayout(
        dim,
        (post,) * heads,
        "hybrid" if hybrid else rope,
        v_bits,
        pre_bands=(pre,) * heads if hybrid else (),
    )
