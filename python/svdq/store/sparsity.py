"""Key sparsity: a decoding step attends to the packed tokens that matter to it, and no others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from svdq import _C, ops
from svdq.store.packed import PackedStore

SCORERS = ("latent", "landmarks")
MAX_CHANNELS: int = _C.MAX_SELECT_CHANNELS
DEFAULT_CHANNELS = 16  # needles need more than the mean attention mass (docs/sparsity.md)


@dataclass(frozen=True)
class Sparsity:
    """How a layer chooses what it attends to.

    Parameters
    ----------
    budget : packed tokens of each KV head, of all stores together, or their share if below 1.
    scorer : ``"latent"``, the leading channels of the codes; ``"landmarks"``, the mean keys of
        chunks.
    channels : leading channels of ``"latent"``.
    """

    budget: int | float
    scorer: str
    channels: int

    def __post_init__(self) -> None:
        if not (0 < self.budget < 1 or (self.budget >= 1 and self.budget == int(self.budget))):
            raise ValueError(
                "sparse_budget must be a number of tokens or a share between 0 and 1, got "
                f"{self.budget!r}"
            )
        if self.scorer not in SCORERS:
            raise ValueError(f"sparse_scorer must be one of {SCORERS}, got {self.scorer!r}")
        if self.channels % 4 or not 4 <= self.channels <= MAX_CHANNELS:
            raise ValueError(
                f"sparse_channels must be a multiple of 4 up to {MAX_CHANNELS}, got {self.channels}"
            )

    def tokens(self, packed: int) -> int:
        """Tokens to select of so many packed ones, at least one."""
        count = math.floor(self.budget * packed) if self.budget < 1 else int(self.budget)
        return max(count, 1)

    def part(self, packed: int, total: int) -> Sparsity:
        """The same for a store that holds so many of all packed tokens: its part of a number."""
        if self.budget < 1 or packed == total:
            return self
        return replace(self, budget=max(int(self.budget) * packed // max(total, 1), 1))


def select(
    query: Tensor, store: PackedStore, sparsity: Sparsity, budget: int, scaling: float, sinks: int
) -> tuple[Tensor, Tensor]:
    """Slots [B, H, M] that a step attends to, and the places of outliers among them.

    Parameters
    ----------
    query : [B, Hq, 1, D].
    store : packed tokens.
    sparsity, budget : how to choose, and how many tokens of a KV head.
    scaling : softmax scale.
    sinks : leading slots that are exact rows.

    Returns
    -------
    slots, outlier_indices : see :func:`svdq.ops.select`.
    """
    if sparsity.scorer == "landmarks":
        return store.landmarks.select(query, store, budget, scaling, sinks)
    return ops.select(
        query,
        store.k_pages,
        store.page_table,
        store.cache_seqlens,
        store.basis,
        store.scale,
        store.mean,
        store.layout,
        budget,
        scaling,
        store.inv_freq,
        store.first_position,
        sinks,
        store.post_mean,
        None if store.outliers is None else store.outliers.slots,
        sparsity.channels,
    )
