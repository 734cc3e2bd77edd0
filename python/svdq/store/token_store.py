"""Tokens of one layer: in the window or packed, and moved from one to the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdq.config.settings import Settings
from svdq.fit.calibration import CalibratedLayer
from svdq.fit.key_gain import amplified
from svdq.fit.layer_fit import Allocate, LayerFit, SequenceFit
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.store.packed import PackedStore
from svdq.store.window import GRANULE, WindowStore


class TokenStore:
    """Keys and values of one layer: the window and, once a basis is fitted, packed pages.

    A sequence of n tokens has its sinks and its last ``residual_length`` to ``residual_length +
    63`` tokens in the window and the rest in pages; sinks are packed too. Until its basis is fitted
    all its tokens are in the window.

    Where widths are allocated, the pages are known once a spectrum was; ``packed`` is None until
    then. Where keys drift from those that a basis was fitted on, a new store with a basis of its
    own is opened behind it, and ``past`` holds the ones before. Window and pages hold keys times
    their gain, see svdq/fit/key_gain.py.

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

    # Moves

    def _store_first(
        self, keys: Tensor, values: Tensor, padding: list[int], first_position: list[int]
    ) -> None:
        """Store the first tokens, [B, H, T, D], and pack those that the window does not keep."""
        counts = [keys.shape[2] - pad for pad in padding]
        targets = [0] * len(counts)
        sinks = self.settings.sink_tokens
        self.position = first_position
        if self.packed is not None:
            self.packed.set_first_position(first_position)
        own = [[x[b, :, pad:] for x in (keys, values)] for b, pad in enumerate(padding)]
        self._plan({b: own[b][0] for b, count in enumerate(counts) if count >= self.fit_tokens})
        if self.packed is not None:
            targets = [self._target(b, count) for b, count in enumerate(counts)]
            pages = [target // PAGE_TOKENS for target in targets]
            self.packed.pool.reserve(sum(pages), max(pages))
        kept = [n - max(target - sinks, 0) for n, target in zip(counts, targets, strict=True)]
        self.window.reserve(max(*kept, self.steady_tokens if any(targets) else 0))
        for b, target in enumerate(targets):
            (k, v), gain = own[b], self.fit.lacking_gain
            if target:
                gain = self._fit(b, k, in_window=False)
                self.packed.pack(b, k[:, :target], v[:, :target], skip=sinks, gain=gain)
                self.window.write(b, amplified(k[:, target:], gain), v[:, target:], sinks)
                k, v = k[:, :sinks], v[:, :sinks]
            self.window.write(b, amplified(k, gain), v, 0)
        self.window.set_count(kept)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Add a few tokens, [B, H, L, D], to the window; none if any is not finite."""
        before, length = self.window.count, keys.shape[2]
        keys = self.fit.amplified(keys)
        self.window.reserve(max(before) + length)
        for b, start in enumerate(before):
            self.window.write(b, keys[b], values[b], start)
        self.window.set_count([start + length for start in before])

    def _retract(self, length: int) -> None:
        """Undo the last :meth:`_append`."""
        self.window.set_count([count - length for count in self.window.count])

    def _append_chunk(self, keys: Tensor, values: Tensor) -> None:
        """Add many tokens, [B, H, L, D], known to be finite, and pack what leaves the window.

        Sequences that are packed already take them page by page, so that their window stays small;
        one that is not yet takes them at once, because its basis is fitted on all its tokens.
        """
        length = keys.shape[2]
        keys = self.fit.amplified(keys)
        for b in range(self.shape[0]):
            step = PAGE_TOKENS if self.packed_slots(b) else length
            for start in range(0, length, step):
                piece = [x[b, :, start : start + step] for x in (keys, values)]
                before, grown = self.window.count[b], self.window.count[b] + piece[0].shape[1]
                self.window.reserve(grown)
                self.window.write(b, *piece, before)
                self.window.count[b] = grown
                self._pack_sequence(b)
        self.window.set_count(self.window.count)
        self._shrink()

    def _pack_window(self) -> None:
        """Pack what has left the window of any sequence."""
        if self.packed is None and self.settings.packs:
            self._plan(
                {
                    b: self.window.keys[b, :, :count]
                    for b, count in enumerate(self.window.count)
                    if count >= self.fit_tokens and b not in self.fit.waiting
                }
            )
        if self.packed is None:
            return
        packed = [self._pack_sequence(b) for b in range(len(self.window.count))]
        if any(packed):
            self.window.set_count(self.window.count)
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

    def _target(self, b: int, count: int) -> int:
        """Slots of sequence b that should be packed once it has this many tokens."""
        packed = self.packed_slots(b)
        before = packed - self.packed.slots[b]
        needed = self.fit_tokens if self.past else self.first_tokens
        if not self.packed.fitted[b] and count - before < needed:
            return packed
        if self.past and not before:
            return packed  # begun anew: its sinks would not be in the first store
        past_window = count - self.settings.residual_length - before
        return max(before + past_window // PAGE_TOKENS * PAGE_TOKENS, packed)

    def _inv_freq(self, num_tokens: int) -> Tensor | None:
        """The layer's inverse frequencies, for sequences of up to this many tokens."""
        return self.fit.inv_freq(max(self.position) + num_tokens - 1)

    def _plan(self, keys: dict[int, Tensor]) -> None:
        """Ask for the layer's bands where they follow from keys, [H, T, D] by sequence."""
        if self.fit.allocate is None or self.packed is not None or not keys:
            return
        sinks = self.settings.sink_tokens
        self.fit.waiting |= {
            b: self._measure(b, x, sinks, self.position[b]) for b, x in keys.items()
        }
        self.fit.ask_widths(max(x.shape[1] for x in keys.values()), self._receive)

    def _receive(self, layout: PageLayout) -> None:
        """Take the layer's pages, and pack the tokens that waited for them."""
        self.packed = self.new_store(layout)
        self.packed.set_first_position(self.position)
        if self.window.capacity:  # else they are about to be stored
            self._pack_window()

    def _measure(self, b: int, keys: Tensor, skip: int, position: int) -> SequenceFit:
        """Gain and bases of sequence b's keys, [H, T, D], the first of them at ``position``.

        ``skip`` of them, sinks, are outliers and left out.
        """
        inv_freq, is_packed = self._inv_freq(keys.shape[1]), self.packed_slots(b) > 0
        return self.fit.measure(b, keys[:, skip:], inv_freq, position + skip, is_packed)

    def _fit(self, b: int, keys: Tensor, *, in_window: bool) -> Tensor | None:
        """Fit sequence b on its keys, [H, T, D] from the first slot of its store on.

        Returns the factor [H, 1, D] that these keys have yet to be multiplied by, if there is one;
        keys in the window are multiplied here.
        """
        packed = self.packed
        skip = 0 if self.packed_slots(b) else self.settings.sink_tokens
        if packed.codec.inv_freq is None:
            packed.set_frequencies(self._inv_freq(keys.shape[1]))
        if packed.calibrated is not None:
            return self._begin(
                b, keys[:, skip:], skip, None if in_window else self.fit.lacking_gain
            )
        fit = self.fit.waiting.pop(b, None) or self._measure(b, keys, skip, packed.position[b])
        gain = None
        if fit.gain is not None:
            gain = self.fit.set_gain(b, fit.gain)
            self.window.keys[b, :, : self.window.count[b]] *= gain
            if in_window:
                gain = None
        options = {"clip": self.settings.clip, "bases": fit.bases, "gain": gain}
        packed.fit(b, keys[:, skip:], skip, **options)
        return gain

    def _begin(self, b: int, keys: Tensor, skip: int, gain: Tensor | None) -> Tensor | None:
        """Begin sequence b with the calibration; nothing is fitted unless that was asked for."""
        options = {"clip": self.settings.clip, "gain": gain}
        if self.past:  # its keys have drifted away from the calibration
            self.packed.fit(b, keys, skip, **options)
        else:  # few keys neither tell a domain nor are enough for a basis
            few = keys.shape[1] + skip < self.fit_tokens
            bound = None if few else self.settings.refit_drift
            self.packed.begin(b, keys, skip, bound=bound, **options)
        return gain

    def _pack_sequence(self, b: int) -> bool:
        """Pack the tokens of sequence b that left its window; whether there were any."""
        slots, count = self.packed_slots(b), self.window.count[b]
        target = self._target(b, self.count(b))
        if target == slots:
            return False
        sinks, fitted = self.settings.sink_tokens, self.packed.fitted[b]
        # Tokens of the window that these slots are.
        start, stop = min(slots, sinks), target - self._slots_after_sinks(b)
        keys, values = self.window.keys[b], self.window.values[b]
        if not fitted:
            self._fit(b, keys[:, start:count], in_window=True)
        skip = 0 if slots else sinks
        self.packed.pack(b, keys[:, start:stop], values[:, start:stop], skip=skip)
        self.window.remove(b, sinks, stop)
        if fitted:
            self._follow_drift(b)
        return True

    def _follow_drift(self, b: int) -> None:
        """Open a store with a new basis for sequence b if its keys are no longer what they were."""
        bound = self.settings.refit_drift
        if bound is None or not float(self.packed.drift.ratio()[b]) > bound:
            return
        if any(not self.packed_slots(other) for other in range(self.shape[0])):
            return  # sinks are in the first store alone
        old = self.packed
        # Others that are half-way there go along, so that a batch does not open a store for each.
        keep = [i for i, drift in enumerate(self.drift()) if not drift > bound / 2]
        self.packed = old.successor(keep)
        self.past.append(old)
        old.pool.compact()

    def _shrink(self) -> None:
        """Give the part of the window back that only a longer past needed."""
        needed = max(*self.window.count, self.steady_tokens if self.any_packed else 0)
        if self.window.capacity > needed + needed // 4 + GRANULE:
            self.window.resize(needed)
