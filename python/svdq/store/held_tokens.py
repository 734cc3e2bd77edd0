"""The tokens of one layer as they lie, and what happens to them between a model's calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdq.config.settings import Settings
from svdq.fit.calibration import CalibratedLayer
from svdq.fit.layer_fit import Allocate, LayerFit
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.store.packed import PackedStore
from svdq.store.window import GRANULE, WindowStore


class HeldTokens:
    """A window and stores of packed pages, cut and selected but not added to.

    Parameters
    ----------
    settings : how to compress.
    shape : B, H, D.
    dtype, device : of the keys and values.
    frequencies, allocate, calibrated : as for :class:`svdq.fit.layer_fit.LayerFit`.
    """

    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        frequencies: Callable[[int], Tensor] | None = None,
        allocate: Allocate | None = None,
        calibrated: CalibratedLayer | None = None,
    ) -> None:
        self.settings, self.shape = settings, shape
        self.dtype, self.device = dtype, device
        self.fit = LayerFit(
            settings, shape, dtype, device, frequencies, allocate, calibrated=calibrated
        )
        self.window = WindowStore(shape, dtype, device)
        self.position = [0] * shape[0]  # of every sequence's first token
        self.past: list[PackedStore] = []
        self.packed: PackedStore | None = None
        if self.fit.layout is not None:
            self.packed = self.new_store(self.fit.layout)
        self.fit_tokens = max(self.fit.min_tokens, self.steady_tokens)
        fits = calibrated is None or settings.prompt_ranges
        self.first_tokens = self.fit_tokens if fits else self.steady_tokens  # to begin with

    def new_store(self, layout: PageLayout) -> PackedStore:
        """An empty store of this layer's pages."""
        settings = self.settings
        return PackedStore(
            layout,
            self.shape[0],
            self.dtype,
            self.device,
            settings.outlier_fraction,
            settings.needs_landmarks,
            calibrated=self.fit.calibrated,
            prompt_ranges=settings.prompt_ranges,
        )

    @property
    def steady_tokens(self) -> int:
        """Largest window of a packed sequence that grows token by token."""
        return self.settings.sink_tokens + self.settings.residual_length + PAGE_TOKENS

    @property
    def stores(self) -> list[PackedStore]:
        """Packed tokens in their order."""
        return self.past if self.packed is None else [*self.past, self.packed]

    @property
    def any_packed(self) -> bool:
        """True if some sequence has packed tokens."""
        return any(any(store.slots) for store in self.stores)

    @property
    def static_possible(self) -> bool:
        """True if every sequence is packed, so that no step has to fit a basis."""
        packed = self.packed
        return packed is not None and all(packed.fitted) and all(packed.slots)

    @property
    def begun(self) -> bool:
        """True if some sequence has a token."""
        return any(self.count(b) for b in range(self.shape[0]))

    def packed_slots(self, b: int) -> int:
        """Packed tokens of sequence b, sinks among them."""
        return sum(store.slots[b] for store in self.stores)

    def count(self, b: int) -> int:
        """Tokens of sequence b, without padding."""
        return self.window.count[b] + self._slots_after_sinks(b)

    def drift(self) -> list[float]:
        """Error of each sequence's latest tokens over the error when its basis was fitted.

        NaN for a sequence that has no basis.
        """
        batch = self.shape[0]
        return [torch.nan] * batch if self.packed is None else self.packed.drift.ratio().tolist()

    def crop(self, length: int) -> None:
        """Remove the last tokens of every sequence; one left with sinks alone loses its basis."""
        sinks, counts = self.settings.sink_tokens, list(self.window.count)
        for b in range(len(counts)):
            left = max(self.count(b) - length, 0)
            if left < self.packed_slots(b):
                # Sinks alone stay where they are if later stores rely on them.
                self._truncate(b, left if left > sinks or self.past else 0)
            counts[b] = left - self._slots_after_sinks(b)
        while self.past and not any(self.packed.slots):
            self.packed = self.past.pop()
        self.window.set_count(counts)
        self._shrink()

    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        self.window.select(indices)
        self.position = [self.position[i] for i in indices]
        self.fit.select(indices)
        for store in self.stores:
            store.select(indices)
        self.shape = (len(indices), *self.shape[1:])

    def compact(self) -> None:
        """Give back what sequences that are gone have left behind."""
        for store in self.stores:
            store.pool.compact()
        self._shrink()

    def _slots_after_sinks(self, b: int) -> int:
        """Packed slots of sequence b that are not in the window as well."""
        return max(self.packed_slots(b) - self.settings.sink_tokens, 0)

    def _truncate(self, b: int, slots: int) -> None:
        """Keep this many packed slots of sequence b."""
        for store in self.stores:
            if slots < store.slots[b]:
                store.truncate(b, slots)
            slots -= store.slots[b]

    def _shrink(self) -> None:
        """Give the part of the window back that only a longer past needed."""
        needed = max(*self.window.count, self.steady_tokens if self.any_packed else 0)
        if self.window.capacity > needed + needed // 4 + GRANULE:
            self.window.resize(needed)
