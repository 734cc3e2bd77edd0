"""Tokens of one layer: in the window or packed, and moved from one to the other."""

from __future__ import annotations

from torch import Tensor

from svdq.fit.key_gain import amplified
from svdq.fit.layer_fit import SequenceFit
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.ops.tensors import int32_tensor
from svdq.store.held_tokens import HeldTokens


class TokenStore(HeldTokens):
    """Keys and values of one layer: the window and, once a basis is fitted, packed pages.

    A sequence of n tokens has its sinks and its last ``residual_length`` to ``residual_length +
    63`` tokens in the window and the rest in pages; sinks are packed too. Until its basis is fitted
    all its tokens are in the window.

    Where widths are allocated, the pages are known once a spectrum was; ``packed`` is None until
    then. Where keys drift from those that a basis was fitted on, a new store with a basis of its
    own is opened behind it, and ``past`` holds the ones before. Window and pages hold keys times
    their gain, see svdq/fit/key_gain.py. Parameters are those of :class:`HeldTokens`.
    """

    def packs(self, b: int, count: int) -> bool:
        """Whether sequence b packs something once it has this many tokens."""
        if self.packed is None:
            return self.settings.packs and count >= self.fit_tokens
        return self._target(b, count) > self.packed_slots(b)

    def _store_first(self, keys: Tensor, values: Tensor, padding: list[int]) -> None:
        """Store the first tokens, [B, H, T, D], and pack those that the window does not keep."""
        counts = [keys.shape[2] - pad for pad in padding]
        targets = [0] * len(counts)
        sinks = self.settings.sink_tokens
        if self.packed is not None:
            self.packed.set_first_position(self.position)
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

    def _append(self, keys: Tensor, values: Tensor, padding: list[int]) -> None:
        """Add a few tokens, [B, H, L, D] without their left padding, to the window."""
        before, length = self.window.count, keys.shape[2]
        keys = self.fit.amplified(keys)
        self.window.reserve(max(before) + length)
        for b, start in enumerate(before):
            self.window.write(b, keys[b, :, padding[b] :], values[b, :, padding[b] :], start)
        new = [length - pad for pad in padding]
        self.window.set_count([n + more for n, more in zip(before, new, strict=True)])

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

    def pack_due(self) -> None:
        """Pack what the last step at full capacity left for the next one; tensors stay in place."""
        packed = [self._pack_sequence(b) for b in range(len(self.window.count))]
        if any(packed):
            self.window.lens.copy_(int32_tensor(self.window.count, self.device))

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
