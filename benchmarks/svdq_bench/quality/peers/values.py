"""Values coded token by token, as most peers do it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from svdq_bench.quality.peers.rounding import (
    SCALE_PAIR_BYTES,
    check_bits,
    check_counts,
    round_to_range,
)

VALUE_GROUP = 32  # channels that share a range in KIVI's values


@dataclass(frozen=True)
class TokenRanges:
    """A range from minimum to maximum for each token, head and group of consecutive channels.

    Bytes of a layer with n coded tokens and groups of g channels:
    ``ceil(H n D bits / 8) + 4 H n D / g`` and the exact tokens.

    Parameters
    ----------
    bits : of a code, 1 to 8.
    group_size : channels of a group; None for all of a head, as is anything larger.
    sink_tokens, residual : first and last tokens that stay exact.
    """

    bits: int
    group_size: int | None = None
    sink_tokens: int = 0
    residual: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_counts(sink_tokens=self.sink_tokens, residual=self.residual)
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    def _groups(self, dim: int) -> int:
        size = min(self.group_size or dim, dim)
        if dim % size:
            raise ValueError(f"values of {dim} channels have no whole groups of {size}")
        return dim // size

    def code(self, values: Tensor) -> Tensor:
        """Values [1, H, T, D] as they come back from their codes."""
        coded = slice(self.sink_tokens, max(values.shape[2] - self.residual, self.sink_tokens))
        out = values.clone()
        groups = values[:, :, coded].unflatten(-1, (self._groups(values.shape[-1]), -1))
        # A range is along the last but one dimension.
        out[:, :, coded] = round_to_range(groups[..., None], self.bits).flatten(-3)
        return out

    def num_bytes(self, shape: tuple[int, int, int], itemsize: int) -> int:
        """Bytes of a layer of (KV heads, tokens, head_dim), exact numbers of ``itemsize`` bytes."""
        heads, tokens, dim = shape
        exact = min(self.sink_tokens + self.residual, tokens)
        rows = heads * (tokens - exact)
        codes = -(-rows * dim * self.bits // 8)
        return codes + rows * self._groups(dim) * SCALE_PAIR_BYTES + heads * exact * dim * itemsize


def values_suffix(v_bits: int | None) -> str:
    """What a label says of coded values."""
    return "" if v_bits is None else f", {v_bits}-bit values"
