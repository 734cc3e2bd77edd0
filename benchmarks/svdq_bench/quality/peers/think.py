"""ThinK: keys with fewer channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_bench.quality.key_memory import KeyMemory
from svdq_bench.quality.peers.base import Peer
from svdq_bench.quality.peers.rounding import check_bits, check_coded, check_counts
from svdq_bench.quality.peers.values import VALUE_GROUP, TokenRanges, values_suffix


@dataclass(frozen=True)
class ThinK(Peer):
    """ThinK (arXiv 2407.21018): channels of a head that matter little to its queries are dropped.

    Kept are the channels with the largest ``||q_d|| ||k_d||``, norms over all tokens; the others
    read as zero. Bytes of a layer with n = T - sink_tokens and m channels kept: ``H n m`` exact
    numbers, ``H ceil(D / 8)`` bytes of masks, and the sinks.

    Parameters
    ----------
    kept : share of the channels that stays, above 0; at least one channel does.
    sink_tokens : leading tokens that keep all channels.
    v_bits : of a value, coded as KIVI's; None for exact values.
    """

    kept: float
    sink_tokens: int = 8
    v_bits: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise ValueError(f"the share of channels kept must be in (0, 1], got {self.kept}")
        check_counts(sink_tokens=self.sink_tokens)
        if self.v_bits is not None:
            check_bits(self.v_bits, "v_bits")

    @property
    def label(self) -> str:
        """The settings in a few words."""
        return f"ThinK, {100 * self.kept:.3g} % of channels{values_suffix(self.v_bits)}"

    def settings(self) -> dict:
        """Columns that name the settings."""
        return {"family": "think", "kept": self.kept, "sink_tokens": self.sink_tokens}

    @property
    def values(self) -> TokenRanges | None:
        """A range for each token and group of channels."""
        if self.v_bits is None:
            return None
        return TokenRanges(self.v_bits, VALUE_GROUP, self.sink_tokens)

    def _channels(self, dim: int) -> int:
        return max(round(self.kept * dim), 1)

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Put zeros into the channels that are dropped."""
        coded = keys[0, :, self.sink_tokens :]
        # Squares order channels as the norms do.
        score = query_energy * coded.float().square().mean(dim=1)
        best = score.topk(self._channels(keys.shape[-1]), dim=-1).indices
        mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
        out = keys.clone()
        out[0, :, self.sink_tokens :] = coded * mask[:, None]
        return out

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """See :class:`ThinK`; a coded number takes ``m / D`` of an exact one."""
        heads, tokens, dim = shape
        coded = tokens - self.sink_tokens
        check_coded(self.label, tokens, coded)
        numbers = heads * coded * self._channels(dim)
        masks = heads * -(-dim // 8)
        exact = heads * self.sink_tokens * dim
        return KeyMemory(
            8 * itemsize * numbers,
            heads * coded * dim,
            (numbers + exact) * itemsize + masks,
            heads * tokens * dim,
        )
