"""Where the tokens of one layer live: which are exact, which are packed, and when they move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq.config.settings import Settings
from svdq.fit.allocation import overhead_bits
from svdq.fit.bases import Bases, fit_bases, thinned
from svdq.fit.pre_channels import Core
from svdq.fit.weighting import QueryEnergy, key_weights
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.store.packed import ROW_STEP, ExactRows, PackedStore, scaled
from svdq.store.tensors import normal_tensors

# allocate(spectrum, overhead, taken, answer), see svdq.allocation.Allocator.ask.
Allocate = Callable[[Tensor, float, float, Callable[[Tensor], None]], None]


@dataclass(frozen=True)
class Fit:
    """What is known of a sequence's keys before their widths are.

    Parameters
    ----------
    weight : [H, D] float32 that keys are multiplied with, or None.
    bases : of the weighted keys; by score variance where the queries' energy is known.
    """

    weight: Tensor | None
    bases: Bases


class TokenStore:
    """Keys and values of one layer: exact rows and, once a basis is fitted, packed pages.

    A sequence of n tokens has its sinks and its last ``residual_length`` to ``residual_length +
    63`` tokens in exact rows and the rest in pages. Until its basis is fitted all its tokens are
    exact rows.

    Where widths are allocated, the pages are known once a spectrum was; ``packed`` is None until
    then. Where keys drift from what a basis was fitted on, a new store with a basis of its own is
    opened behind it, and ``past`` holds the ones before. Rows and pages hold keys that are
    multiplied with ``weight``, see svdq/weighting.py.

    Parameters
    ----------
    settings : how to compress.
    shape : B, H, D.
    dtype, device : of the keys and values.
    frequencies : maps the largest position in use to the layer's inverse frequencies; None for
        layers whose keys are packed as they come.
    allocate : called as ``allocate(spectrum, overhead, taken, answer)`` for the layer's bands, see
        :meth:`svdq.allocation.Allocator.ask`; None where a schedule says them.
    """

    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        frequencies: Callable[[int], Tensor] | None,
        allocate: Allocate | None = None,
    ) -> None:
        batch, heads, dim = shape
        self.settings, self.shape = settings, shape
        self.frequencies, self.allocate = frequencies, allocate
        self.rows = ExactRows(batch, heads, dim, dtype, device)
        self.position = [0] * batch  # of every sequence's first token
        self.past: list[PackedStore] = []
        self.packed: PackedStore | None = None
        self.energy: QueryEnergy | None = None
        self.weight: Tensor | None = None
        self._core: PageLayout | None = None  # a hybrid layout, of which the core counts
        self._fits: dict[int, Fit] = {}  # of sequences that are not packed yet
        if settings.packs:
            core, tail = settings.pre_bands(), (0, 0, 4, 0)  # some tail, until it is allocated
            if not settings.allocates:
                core, tail = settings.scheduled_bands(dim)
            # Says what is wrong before tokens come.
            layout = settings.layout([tail] * heads, dim, dtype, [core] * heads)
            if not settings.allocates:
                self.packed = self._store(layout, dtype, device)
            if layout.rope == "hybrid":
                self._core = layout
        if settings.needs_queries:
            self.energy = QueryEnergy(batch, heads, dim, device)
        if settings.query_weighted:
            self.weight = torch.ones((batch, heads, dim), dtype=torch.bfloat16, device=device)
        least = 4 * dim if settings.min_fit_tokens is None else settings.min_fit_tokens
        self.fit_tokens = max(least, self.steady_rows)

    @property
    def steady_rows(self) -> int:
        """Exact rows of a packed sequence that grows token by token, at most."""
        return self.settings.sink_tokens + self.settings.residual_length + PAGE_TOKENS

    @property
    def waiting(self) -> list[Fit]:
        """What is known of sequences that are not packed yet."""
        return list(self._fits.values())

    @property
    def any_packed(self) -> bool:
        """Whether some sequence has packed tokens."""
        return any(any(store.slots) for store in self.stores)

    @property
    def stores(self) -> list[PackedStore]:
        """Packed tokens in their order."""
        return self.past if self.packed is None else [*self.past, self.packed]

    def packed_slots(self, b: int) -> int:
        """Packed tokens of sequence b, sinks among them."""
        return sum(store.slots[b] for store in self.stores)

    def drift(self) -> list[float]:
        """Error of each sequence's latest tokens over the error when its basis was fitted.

        NaN for a sequence that has no basis.
        """
        batch = self.shape[0]
        return [torch.nan] * batch if self.packed is None else self.packed.drift().tolist()

    def count(self, b: int) -> int:
        """Tokens of sequence b, without padding."""
        return self.rows.count[b] + self._unseen_slots(b)

    def note_queries(self, query: Tensor, scaling: float, padding: list[int]) -> None:
        """Take the energy of queries, [B, Hq, L, D], while it may still matter."""
        if self.energy is not None and not (self.packed and all(self.packed.fitted)):
            self.energy.add(query, scaling, padding)

    def weighted(self, keys: Tensor) -> Tensor:
        """Keys [B, H, L, D] as rows and pages hold them."""
        return keys if self.weight is None else keys * self.weight[:, :, None].to(keys.dtype)

    def weighted_query(self, query: Tensor) -> Tensor:
        """Queries [B, Hq, L, D] that give the same scores with such keys."""
        if self.weight is None:
            return query
        inverse = (1 / self.weight).to(query.dtype)[:, :, None, None]
        return (query.unflatten(1, (self.shape[1], -1)) * inverse).flatten(1, 2)

    def prefill(
        self, keys: Tensor, values: Tensor, padding: list[int], first_position: list[int]
    ) -> None:
        """Store the first tokens, [B, H, T, D], packing from them what is not kept exact."""
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
            self.packed.reserve(sum(target // PAGE_TOKENS for target in targets))
        kept = [n - max(target - sinks, 0) for n, target in zip(counts, targets, strict=True)]
        self.rows.reserve(max(*kept, self.steady_rows if any(targets) else 0))
        for b, target in enumerate(targets):
            k, v = own[b]
            if target:
                factor = self._fit(b, k)
                self.packed.pack(b, k[:, :target], v[:, :target], sinks, factor)
                self.rows.write(b, scaled(k[:, target:], factor), v[:, target:], sinks)
                k, v = scaled(k[:, :sinks], factor), v[:, :sinks]
            self.rows.write(b, k, v, 0)
        self.rows.set_count(kept)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add a few tokens, [B, H, L, D], to the exact rows; none if any is not finite."""
        before, length = self.rows.count, keys.shape[2]
        keys = self.weighted(keys)
        self.rows.reserve(max(before) + length)
        for b, start in enumerate(before):
            self.rows.write(b, keys[b], values[b], start)
        self.rows.set_count([count + length for count in before])

    def retract(self, length: int) -> None:
        """Undo the last :meth:`append`."""
        self.rows.set_count([count - length for count in self.rows.count])

    def append_chunk(self, keys: Tensor, values: Tensor) -> None:
        """Add many tokens, [B, H, L, D], known to be finite, and pack what leaves the window.

        Sequences that are packed already take them page by page, so that their exact rows stay few;
        one that is not yet takes them at once, because its basis is fitted on all its tokens.
        """
        length = keys.shape[2]
        keys = self.weighted(keys)
        for b in range(self.shape[0]):
            step = PAGE_TOKENS if self.packed_slots(b) else length
            for start in range(0, length, step):
                piece = [x[b, :, start : start + step] for x in (keys, values)]
                before, grown = self.rows.count[b], self.rows.count[b] + piece[0].shape[1]
                self.rows.reserve(grown)
                self.rows.write(b, *piece, before)
                self.rows.count[b] = grown
                self._pack_sequence(b)
        self.rows.set_count(self.rows.count)
        self._shrink()

    def pack_window(self) -> None:
        """Pack what has left the window of any sequence."""
        if self.packed is None and self.settings.packs:
            self._plan(
                {
                    b: self.rows.keys[b, :, :count]
                    for b, count in enumerate(self.rows.count)
                    if count >= self.fit_tokens and b not in self._fits
                }
            )
        if self.packed is None:
            return
        packed = [self._pack_sequence(b) for b in range(len(self.rows.count))]
        if any(packed):
            self.rows.set_count(self.rows.count)
            self._shrink()

    def crop(self, length: int) -> None:
        """Remove the last tokens of every sequence; one left with sinks alone loses its basis."""
        sinks, counts = self.settings.sink_tokens, list(self.rows.count)
        for b in range(len(counts)):
            left = max(self.count(b) - length, 0)
            if left < self.packed_slots(b):
                # Sinks alone stay where they are if later stores rely on them.
                self._truncate(b, left if left > sinks or self.past else 0)
            counts[b] = left - self._unseen_slots(b)
        while self.past and not any(self.packed.slots):
            self.packed = self.past.pop()
        self.rows.set_count(counts)
        self._shrink()

    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        self.rows.select(indices)
        self.position = [self.position[i] for i in indices]
        self._fits = {to: self._fits[i] for to, i in enumerate(indices) if i in self._fits}
        if self.energy is not None:
            self.energy.select(indices)
        if self.weight is not None:
            self._select_weight(indices)
        for store in self.stores:
            store.select(indices)
        self.shape = (len(indices), *self.shape[1:])

    @normal_tensors
    def _select_weight(self, indices: list[int]) -> None:
        self.weight = self.weight[indices]

    def compact(self) -> None:
        """Give back what sequences that are gone have left behind."""
        for store in self.stores:
            store.compact()
        self._shrink()

    def _unseen_slots(self, b: int) -> int:
        """Packed slots of sequence b that are not held exact as well: all but the sinks."""
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
        if not self.packed.fitted[b] and count - before < self.fit_tokens:
            return packed
        if self.past and not before:
            return packed  # begun anew beside others: its sinks would not be in the first store
        past_window = count - self.settings.residual_length - before
        return max(before + past_window // PAGE_TOKENS * PAGE_TOKENS, packed)

    def _inv_freq(self, num_tokens: int) -> Tensor | None:
        """The layer's inverse frequencies, for sequences of up to this many tokens."""
        if self.frequencies is None:
            return None
        last = max(self.position) + num_tokens - 1
        return self.frequencies(last).to(self.rows.keys.device)

    def _plan(self, keys: dict[int, Tensor]) -> None:
        """Ask for the layer's bands where they follow from keys, [H, T, D] by sequence."""
        if self.allocate is None or self.packed is not None or not keys:
            return
        sinks = self.settings.sink_tokens
        self._fits |= {
            b: self._measure(b, x, sinks, self.position[b] + sinks) for b, x in keys.items()
        }
        spectra = [fit.bases.spectrum for fit in self._fits.values()]
        tokens = max(x.shape[1] for x in keys.values())
        spectrum = torch.stack(spectra).mean(dim=0)
        overhead = overhead_bits(self.shape[2], tokens)
        self.allocate(spectrum, overhead, self.settings.core_bits(self.shape[2]), self._receive)

    def _receive(self, bands: Tensor) -> None:
        """Take the layer's bands, and pack the tokens that waited for them."""
        dtype, device = self.rows.keys.dtype, self.rows.keys.device
        core = self._core.pre_bands if self._core is not None else ()
        tail = [tuple(head) for head in bands.tolist()]
        layout = self.settings.layout(tail, self.shape[2], dtype, core)
        self.packed = self._store(layout, dtype, device)
        self.packed.set_first_position(self.position)
        if self.rows.capacity:  # else they are about to be stored
            self.pack_window()

    def _store(self, layout: PageLayout, dtype: torch.dtype, device: torch.device) -> PackedStore:
        fraction, landmarks = self.settings.outlier_fraction, self.settings.needs_landmarks
        return PackedStore(layout, self.shape[0], dtype, device, fraction, landmarks)

    def _measure(self, b: int, keys: Tensor, skip: int, position: int) -> Fit:
        """Weights, basis and spectrum of sequence b's keys, [H, T, D].

        The first ``skip`` keys, sinks, are outliers and left out; ``position`` is the next one's.
        """
        where = self._inv_freq(keys.shape[1]), position
        core = None if self._core is None else Core.of(self._core, where[0])
        # Before they are weighted: a copy of few keys, not of all.
        keys, inv_freq, position = thinned(keys[:, skip:], *where)
        half = 0 if inv_freq is None else inv_freq.numel()
        weight = energy = None
        if self.energy is not None:
            energy = self.energy.mean(b, half)
        if self.weight is not None:
            # Tokens that are packed already stay weighted as they are.
            weight = self.weight[b].float() if self.packed_slots(b) else key_weights(energy)
            keys = keys * (weight / self.weight[b].float())[:, None].to(keys.dtype)
            energy = energy / weight.square()
        clip = self.settings.clip
        return Fit(weight, fit_bases(keys, core, inv_freq, position, clip, energy))

    def _fit(self, b: int, keys: Tensor) -> Tensor | None:
        """Fit sequence b on its keys, [H, T, D] from the first slot of its store on.

        Returns what keys have to be multiplied with, [H, 1, D], if they have; rows are already.
        """
        packed = self.packed
        skip = 0 if self.packed_slots(b) else self.settings.sink_tokens
        if packed.inv_freq is None:
            packed.inv_freq = self._inv_freq(keys.shape[1])
        fit = self._fits.pop(b, None) or self._measure(b, keys, skip, packed.position[b] + skip)
        factor = None
        if fit.weight is not None:
            factor = (fit.weight / self.weight[b].float()).to(keys.dtype)[:, None]
            self.rows.keys[b, :, : self.rows.count[b]] *= factor
            if keys.data_ptr() == self.rows.keys[b].data_ptr():
                factor = None
            self.weight[b] = fit.weight
        packed.fit(b, keys[:, skip:], skip, self.settings.clip, fit.bases, factor)
        return factor

    def _pack_sequence(self, b: int) -> bool:
        """Pack the exact rows of sequence b that left its window; whether there were any."""
        slots, count = self.packed_slots(b), self.rows.count[b]
        target = self._target(b, self.count(b))
        if target == slots:
            return False
        sinks, fitted = self.settings.sink_tokens, self.packed.fitted[b]
        start, stop = min(slots, sinks), target - self._unseen_slots(b)  # rows of these slots
        keys, values = self.rows.keys[b], self.rows.values[b]
        if not fitted:
            self._fit(b, keys[:, start:count])
        skip = 0 if slots else sinks
        self.packed.pack(b, keys[:, start:stop], values[:, start:stop], skip)
        self.rows.remove(b, sinks, stop)
        if fitted:
            self._follow_drift(b)
        return True

    def _follow_drift(self, b: int) -> None:
        """Open a store with a new basis for sequence b if its keys are no longer what they were."""
        bound = self.settings.refit_drift
        if bound is None or not float(self.packed.drift()[b]) > bound:
            return
        if any(not self.packed_slots(other) for other in range(self.shape[0])):
            return  # sinks are in the first store alone
        old = self.packed
        # Others that are half-way there go along, so that a batch does not open a store for each.
        keep = [i for i, drift in enumerate(self.drift()) if not drift > bound / 2]
        self.packed = old.successor(keep)
        self.past.append(old)
        old.compact()

    def _shrink(self) -> None:
        """Give exact rows back that only a longer past needed."""
        needed = max(*self.rows.count, self.steady_rows if self.any_packed else 0)
        if self.rows.capacity > needed + needed // 4 + ROW_STEP:
            self.rows.resize(needed)
