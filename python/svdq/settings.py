"""How a layer of the cache compresses, and the pages that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq.layout import PageLayout
from svdq.presets import Schedule


@dataclass(frozen=True)
class Settings:
    """How a layer compresses; see :class:`svdq.SVDqCache`.

    Widths come from a ``schedule``, or are allocated (``k_bits``, ``lambda_``); with neither, all
    stays exact.
    """

    schedule: Schedule | None
    k_bits: float | None
    lambda_: float | None
    allocate_across: str
    query_weighted: bool
    v_bits: int | str
    v_group_size: int | None
    rope: str
    clip: bool
    sink_tokens: int
    residual_length: int
    min_fit_tokens: int | None
    refit_drift: float | None

    @property
    def allocates(self) -> bool:
        """Whether widths follow from the keys."""
        return self.k_bits is not None or self.lambda_ is not None

    @property
    def packs(self) -> bool:
        """Whether anything is ever packed."""
        return self.schedule is not None or self.allocates

    @property
    def needs_queries(self) -> bool:
        """Whether the energy of the queries matters."""
        return self.allocates or self.query_weighted

    def layout(self, bands: Tensor, head_dim: int, dtype: torch.dtype) -> PageLayout:
        """The pages of a layer whose heads have these bands, [H, 4]."""
        exact_bits = dtype.itemsize * 8
        v_bits = exact_bits if self.v_bits == "exact" else self.v_bits
        if v_bits not in (2, 4, exact_bits):
            raise ValueError(
                f"v_bits must be 2, 4, {exact_bits} or 'exact' for a model in {dtype}, got "
                f"{v_bits!r}"
            )
        group = default_group_size(head_dim) if self.v_group_size is None else self.v_group_size
        return PageLayout(
            head_dim, tuple(map(tuple, bands.tolist())), self.rope, int(v_bits), group
        )


def default_group_size(head_dim: int) -> int:
    """Channels that share a value scale: 64 if that divides, else a small head, else near 64."""
    if head_dim % 64 == 0:
        return 64
    if head_dim < 128:
        return head_dim
    sizes = [n for n in range(16, head_dim + 1, 16) if head_dim % n == 0] or [head_dim]
    return min(sizes, key=lambda n: max(n / 64, 64 / n))
