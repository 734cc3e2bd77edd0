"""Where the tokens of one layer live: which are exact, which are packed, and when they move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq import ops
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.presets import Schedule
from svdq.storage import ROW_STEP, ExactRows, PackedStore


@dataclass(frozen=True)
class Settings:
    """How a layer compresses; see :class:`svdq.SVDqCache`. ``schedule=None`` keeps all exact."""

    schedule: Schedule | None
    v_bits: int | str
    v_group_size: int | None
    rope: str
    clip: bool
    sink_tokens: int
    residual_length: int
    min_fit_tokens: int | None

    def layout(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> PageLayout | None:
        """The pages of a layer of these shapes, None where nothing is ever packed."""
        if self.schedule is None:
            return None
        exact_bits = dtype.itemsize * 8
        v_bits = exact_bits if self.v_bits == "exact" else self.v_bits
        if v_bits not in (2, 4, exact_bits):
            raise ValueError(
                f"v_bits must be 2, 4, {exact_bits} or 'exact' for a model in {dtype}, got "
                f"{v_bits!r}"
            )
        group = default_group_size(head_dim) if self.v_group_size is None else self.v_group_size
        bands = ops.allocate_bits(torch.zeros(num_kv_heads, head_dim), list(self.schedule))
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


class TokenStore:
    """Keys and values of one layer: exact rows and, once a basis is fitted, packed pages.

    A sequence of n tokens has its sinks and its last ``residual_length`` to ``residual_length +
    63`` tokens in exact rows and the rest in pages. Until its basis is fitted all its tokens are
    exact rows.

    Parameters
    ----------
    settings : how to compress.
    shape : B, H, D.
    dtype, device : of the keys and values.
    frequencies : maps the largest position in use to the layer's inverse frequencies; None for
        layers whose keys are packed as they come.
    """

    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        frequencies: Callable[[int], Tensor] | None,
    ) -> None:
        batch, heads, dim = shape
        layout = settings.layout(heads, dim, dtype)
        self.settings = settings
        self.frequencies = frequencies
        self.rows = ExactRows(batch, heads, dim, dtype, device)
        self.packed = None
        if layout is not None:
            self.packed = PackedStore(layout, batch, dtype, device)
        least = 4 * dim if settings.min_fit_tokens is None else settings.min_fit_tokens
        self.fit_tokens = max(least, self.steady_rows)

    @property
    def steady_rows(self) -> int:
        """Exact rows of a packed sequence that grows token by token, at most."""
        return self.settings.sink_tokens + self.settings.residual_length + PAGE_TOKENS

    @property
    def any_packed(self) -> bool:
        """Whether some sequence has packed tokens."""
        return self.packed is not None and any(self.packed.slots)

    def count(self, b: int) -> int:
        """Tokens of sequence b, without padding."""
        return self.rows.count[b] + self._unseen_slots(b)

    def prefill(
        self, keys: Tensor, values: Tensor, padding: list[int], first_position: list[int]
    ) -> None:
        """Store the first tokens, [B, H, T, D], packing from them what is not kept exact."""
        counts = [keys.shape[2] - pad for pad in padding]
        targets = [0] * len(counts)
        if self.packed is not None:
            self.packed.set_first_position(first_position)
            targets = [self._target(b, count) for b, count in enumerate(counts)]
            self.packed.reserve(sum(target // PAGE_TOKENS for target in targets))
        sinks = self.settings.sink_tokens
        kept = [n - max(target - sinks, 0) for n, target in zip(counts, targets, strict=True)]
        self.rows.reserve(max(*kept, self.steady_rows if any(targets) else 0))
        for b, target in enumerate(targets):
            own = [x[b, :, padding[b] :] for x in (keys, values)]
            if target:
                self._fit(b, own[0])
                self.packed.pack(b, *(x[:, :target] for x in own))
                self.rows.write(b, *(x[:, target:] for x in own), sinks)
                own = [x[:, :sinks] for x in own]
            self.rows.write(b, *own, 0)
        self.rows.set_count(kept)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add a few tokens, [B, H, L, D], to the exact rows; none if any is not finite."""
        before, length = self.rows.count, keys.shape[2]
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
        for b, slots in enumerate(self.packed.slots):
            step = PAGE_TOKENS if slots else length
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
            if self.packed is not None and left < self.packed.slots[b]:
                self.packed.truncate(b, left if left > sinks else 0)
            counts[b] = left - self._unseen_slots(b)
        self.rows.set_count(counts)
        self._shrink()

    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        self.rows.select(indices)
        if self.packed is not None:
            self.packed.select(indices)

    def compact(self) -> None:
        """Give back what sequences that are gone have left behind."""
        if self.packed is not None:
            self.packed.compact()
        self._shrink()

    def _unseen_slots(self, b: int) -> int:
        """Packed slots of sequence b that are not held exact as well: all but the sinks."""
        slots = self.packed.slots[b] if self.packed is not None else 0
        return max(slots - self.settings.sink_tokens, 0)

    def _target(self, b: int, count: int) -> int:
        """Slots of sequence b that should be packed once it has this many tokens."""
        if not self.packed.fitted[b] and count < self.fit_tokens:
            return 0
        past_window = (count - self.settings.residual_length) // PAGE_TOKENS * PAGE_TOKENS
        return max(past_window, self.packed.slots[b])

    def _fit(self, b: int, keys: Tensor) -> None:
        """Fit sequence b's basis on its keys, [H, T, D] from slot 0, without sinks: outliers."""
        packed, sinks = self.packed, self.settings.sink_tokens
        if packed.inv_freq is None and self.frequencies is not None:
            last = max(packed.position) + keys.shape[1] - 1
            packed.inv_freq = self.frequencies(last).to(keys.device)
        packed.fit(b, keys[:, sinks:], sinks, self.settings.clip)

    def _pack_sequence(self, b: int) -> bool:
        """Pack the exact rows of sequence b that left its window; whether there were any."""
        slots, count = self.packed.slots[b], self.rows.count[b]
        target = self._target(b, self.count(b))
        if target == slots:
            return False
        sinks = self.settings.sink_tokens
        start, stop = min(slots, sinks), target - self._unseen_slots(b)  # rows of these slots
        keys, values = self.rows.keys[b], self.rows.values[b]
        if not self.packed.fitted[b]:
            self._fit(b, keys[:, :count])
        self.packed.pack(b, keys[:, start:stop], values[:, start:stop])
        self.rows.remove(b, sinks, stop)
        return True

    def _shrink(self) -> None:
        """Give exact rows back that only a longer past needed."""
        needed = max(*self.rows.count, self.steady_rows if self.any_packed else 0)
        if self.rows.capacity > needed + needed // 4 + ROW_STEP:
            self.rows.resize(needed)
