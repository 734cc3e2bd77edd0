"""Peers that code a channel of the keys with equal steps: per channel, and KIVI."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from svdq_bench.quality.key_memory import KeyMemory
from svdq_bench.quality.peers.base import Peer
from svdq_bench.quality.peers.rounding import (
    SCALE_PAIR_BYTES,
    check_bits,
    check_coded,
    check_counts,
    code_memory,
    round_to_range,
)
from svdq_bench.quality.peers.values import VALUE_GROUP, TokenRanges, values_suffix


@dataclass(frozen=True)
class PerChannel(Peer):
    """Asymmetric codes with one range from min to max for each channel of a head.

    Bytes of a layer with n = T - sink_tokens: ``ceil(H D n bits / 8) + 4 H D`` and the sinks.

    Parameters
    ----------
    bits : of a code, 1 to 8.
    sink_tokens : leading tokens that stay exact.
    v_bits : of a value, with one range for each token of a head; None for exact values.
    """

    bits: int
    sink_tokens: int = 8
    v_bits: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_counts(sink_tokens=self.sink_tokens)
        if self.v_bits is not None:
            check_bits(self.v_bits, "v_bits")

    @property
    def label(self) -> str:
        """The settings in a few words."""
        return f"per-channel {self.bits}-bit{values_suffix(self.v_bits)}"

    def settings(self) -> dict:
        """Columns that name the settings."""
        return {"family": "per-channel", "bits": self.bits, "sink_tokens": self.sink_tokens}

    @property
    def values(self) -> TokenRanges | None:
        """A range for each token of a head."""
        if self.v_bits is None:
            return None
        return TokenRanges(self.v_bits, sink_tokens=self.sink_tokens)

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Round every channel's numbers to its range."""
        out = keys.clone()
        coded = keys[:, :, self.sink_tokens :]
        out[:, :, self.sink_tokens :] = round_to_range(coded, self.bits)
        return out

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """See :class:`PerChannel`."""
        heads, tokens, dim = shape
        coded = tokens - self.sink_tokens
        check_coded(self.label, tokens, coded)
        return code_memory(shape, itemsize, coded, self.bits, heads * dim * SCALE_PAIR_BYTES)


@dataclass(frozen=True)
class Kivi(Peer):
    """KIVI (arXiv 2402.02750): a range for each channel and group of consecutive tokens.

    Tokens that do not fill a group keep their keys exact. Bytes of a layer's keys with g whole
    groups: ``ceil(H D g group_size bits / 8) + 4 H D g`` and the exact tokens. Values have a range
    for each token and ``VALUE_GROUP`` channels; all of them have except sinks and residual.

    Parameters
    ----------
    bits : of a code, 1 to 8.
    group_size : tokens of a group.
    residual : last tokens that stay exact at least.
    sink_tokens : leading tokens that stay exact; KIVI itself keeps none.
    v_bits : of a value; None for exact values.
    """

    bits: int
    group_size: int = 32
    residual: int = 0
    sink_tokens: int = 0
    v_bits: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_counts(residual=self.residual, sink_tokens=self.sink_tokens)
        if self.v_bits is not None:
            check_bits(self.v_bits, "v_bits")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    @property
    def label(self) -> str:
        """The settings in a few words."""
        residual = f", {self.residual} last tokens exact" if self.residual else ""
        keys = f"KIVI {self.bits}-bit, groups of {self.group_size}{residual}"
        return keys + values_suffix(self.v_bits)

    def settings(self) -> dict:
        """Columns that name the settings."""
        return {
            "family": "kivi",
            "bits": self.bits,
            "group_size": self.group_size,
            "residual_length": self.residual,
            "sink_tokens": self.sink_tokens,
        }

    @property
    def values(self) -> TokenRanges | None:
        """A range for each token and group of channels."""
        if self.v_bits is None:
            return None
        return TokenRanges(self.v_bits, VALUE_GROUP, self.sink_tokens, self.residual)

    def _groups(self, tokens: int) -> int:
        return max(tokens - self.sink_tokens - self.residual, 0) // self.group_size

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Round the numbers of every channel and group to their range."""
        groups = self._groups(keys.shape[2])
        coded = slice(self.sink_tokens, self.sink_tokens + groups * self.group_size)
        out = keys.clone()
        grouped = keys[:, :, coded].unflatten(2, (groups, self.group_size))
        out[:, :, coded] = round_to_range(grouped, self.bits).flatten(2, 3)
        return out

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """See :class:`Kivi`."""
        heads, tokens, dim = shape
        groups = self._groups(tokens)
        check_coded(self.label, tokens, groups)
        pair_bytes = groups * heads * dim * SCALE_PAIR_BYTES
        return code_memory(shape, itemsize, groups * self.group_size, self.bits, pair_bytes)
