"""How a layer of the cache compresses, and the pages that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from svdq import ops
from svdq.config.presets import Schedule
from svdq.layout import WIDTHS, PageLayout
from svdq.store.sparsity import DEFAULT_CHANNELS, Sparsity

ROPE_MODES = ("pre", "post", "rotated-mean", "hybrid")
CORE_BITS = 4  # of every core channel where the tail's bits are allocated

Bands = tuple[int, int, int, int]  # channels at each width of one head


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
    core_channels: int
    clip: bool
    outlier_fraction: float
    sink_tokens: int
    residual_length: int
    min_fit_tokens: int | None
    refit_drift: float | None
    sparse_budget: int | float | None | tuple[int | float | None, ...] = None
    sparse_scorer: str = "latent"
    sparse_channels: int = DEFAULT_CHANNELS

    def sparsity(self, layer: int) -> Sparsity | None:
        """How layer ``layer`` chooses what it attends to; None where that is everything."""
        budget = self.sparse_budget
        if isinstance(budget, (tuple, list)):
            budget = budget[layer]
        if budget is None:
            return None
        return Sparsity(budget, self.sparse_scorer, self.sparse_channels)

    @property
    def needs_landmarks(self) -> bool:
        """Whether pages come with landmarks."""
        return self.sparse_budget is not None and self.sparse_scorer == "landmarks"

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

    @property
    def layout_rope(self) -> str:
        """The layout's RoPE mode: a rotated mean is a hybrid without core channels."""
        return "hybrid" if self.rope == "rotated-mean" else self.rope

    def scheduled_bands(self, head_dim: int) -> tuple[Bands, Bands]:
        """Core and tail bands of a head by the schedule: its first channels are the core."""
        return scheduled_bands(
            head_dim, self.schedule, self.core_channels if self.rope == "hybrid" else 0
        )

    def pre_bands(self) -> Bands:
        """Core bands of a head where the tail's are allocated."""
        core = self.core_channels if self.rope == "hybrid" else 0
        return tuple(core if width == CORE_BITS else 0 for width in WIDTHS)

    def core_bits(self, head_dim: int) -> float:
        """Bits per key number that the core takes where the tail's bits are allocated."""
        return sum(self.pre_bands()) * CORE_BITS / head_dim

    def layout(
        self,
        bands: Sequence[Bands],
        head_dim: int,
        dtype: torch.dtype,
        pre_bands: Sequence[Bands] = (),
    ) -> PageLayout:
        """The pages of a layer whose heads have these bands, those of the tail for a hybrid."""
        exact_bits = dtype.itemsize * 8
        v_bits = exact_bits if self.v_bits == "exact" else self.v_bits
        if v_bits not in (2, 4, exact_bits):
            raise ValueError(
                f"v_bits must be 2, 4, {exact_bits} or 'exact' for a model in {dtype}, got "
                f"{v_bits!r}"
            )
        group = default_group_size(head_dim) if self.v_group_size is None else self.v_group_size
        return PageLayout(
            head_dim,
            tuple(bands),
            self.layout_rope,
            int(v_bits),
            group,
            pre_bands=tuple(pre_bands) if self.layout_rope == "hybrid" else (),
        )


def scheduled_bands(
    head_dim: int, schedule: Sequence[int], core_channels: int = 0
) -> tuple[Bands, Bands]:
    """Core and tail bands of a head by a schedule, whose first channels are the core."""
    bands = ops.allocate_bits(torch.zeros(1, head_dim), list(schedule))[0].tolist()
    core, left = [], core_channels
    for count in bands:
        core.append(min(count, left))
        left -= core[-1]
    return tuple(core), tuple(n - own for n, own in zip(bands, core, strict=True))


def default_group_size(head_dim: int) -> int:
    """Channels that share a value scale: 64 if that divides, else a small head, else near 64."""
    if head_dim % 64 == 0:
        return 64
    if head_dim < 128:
        return head_dim
    sizes = [n for n in range(16, head_dim + 1, 16) if head_dim % n == 0] or [head_dim]
    return min(sizes, key=lambda n: max(n / 64, 64 / n))
