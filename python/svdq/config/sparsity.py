"""Settings of key sparsity: a step of one token attends to a part of the packed tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from svdq import _C

SCORERS = ("latent", "landmarks")
MAX_CHANNELS: int = _C.MAX_SELECT_CHANNELS
DEFAULT_CHANNELS = 16  # needles need more than the mean attention mass (docs/sparsity.md)


@dataclass(frozen=True)
class Sparsity:
    """How a layer chooses the packed tokens that it attends to.

    Parameters
    ----------
    budget : packed tokens of each KV head, of all stores together, or their share if below 1.
    scorer : ``"latent"``, the proxy channels of the codes; ``"landmarks"``, the mean keys of
        chunks.
    channels : proxy channels of ``"latent"``.
    """

    budget: int | float
    scorer: str = SCORERS[0]
    channels: int = DEFAULT_CHANNELS

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
