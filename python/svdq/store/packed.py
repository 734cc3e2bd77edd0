"""What a layer of the cache holds: packed pages with their bases, and the exact rows beside them.

Slot s of a sequence is its s-th real token (padding is not stored). Slots ``0 .. slots - 1`` are
packed; the exact rows hold the attention sinks, which are packed too, then every token that is not
packed, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq import ops
from svdq.fit.bases import Bases, fit_bases, fit_codes, thinned
from svdq.fit.pre_channels import Core
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.store.landmarks import Landmarks
from svdq.store.outliers import Outliers
from svdq.store.tensors import normal_tensors

DRIFT_MEMORY = 0.75  # what a page leaves of the mean error before it
ROW_STEP = 16  # exact rows are allocated in multiples of this
PIECE_TOKENS = 2048  # keys that have to be copied are copied so many at a time


def _integers(values: list, device: torch.device) -> Tensor:
    """The int32 tensor that operators take."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def scaled(keys: Tensor, factor: Tensor | None) -> Tensor:
    """Keys [H, T, D] times a factor [H, 1, D]; themselves without one."""
    return keys if factor is None else keys * factor


class PackedStore:
    """Pages of one layer, shared by its sequences, and the basis of each sequence.

    A page is never written again once its 64 slots are full, so sequences that were copied from one
    another (beams) name the same pages; a page that is part full is copied before one of its owners
    goes on filling it.

    Parameters
    ----------
    layout : layout of the pages.
    batch_size : sequences, B.
    dtype : the model's dtype, in which exact values (16 and 32 bits) are held.
    device : where everything lies.
    outlier_fraction : share of a prompt's tokens whose keys are held exact too, in every head.
    landmarks : whether pages come with landmarks, which choose what is attended.

    Attributes
    ----------
    k_pages, v_pages : pools of pages, [P, bytes] uint8 (exact values: [P, numbers] in ``dtype``).
    pages, page_table : the pages of each sequence in order, as tuples and as [B, N] int32.
    slots, cache_seqlens : packed slots of each sequence, as a list and as [B] int32.
    position, first_position : position of slot 0 of each sequence, as a list and as [B] int32.
    basis, scale, mean : [B, R, D] bfloat16, [B, R] float32, [B, H, D] float32; valid where
        ``fitted``.
    post_mean : [B, H, D] float32 of a hybrid layout, else None.
    fit_error, error : [B, H] float32, mean squared error of a key when the basis was fitted, and of
        late.
    inv_freq : [rotary_dim / 2] float32; None before the first fit and where keys are packed as they
        come.
    """

    @normal_tensors
    def __init__(
        self,
        layout: PageLayout,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        outlier_fraction: float = 0.0,
        landmarks: bool = False,
    ) -> None:
        self.layout, self.dtype, self.device = layout, dtype, device
        self.outlier_fraction = outlier_fraction
        heads, dim, rank = layout.num_kv_heads, layout.head_dim, layout.rank
        window_values = layout.v_bits > 8
        v_page = heads * PAGE_TOKENS * dim if window_values else layout.v_page_bytes
        self.k_pages = torch.empty((0, layout.k_page_bytes), dtype=torch.uint8, device=device)
        self.v_pages = torch.empty(
            (0, v_page), dtype=dtype if window_values else torch.uint8, device=device
        )
        self.basis = torch.zeros((batch_size, rank, dim), dtype=torch.bfloat16, device=device)
        self.scale = torch.zeros((batch_size, rank), device=device)
        self.mean = torch.zeros((batch_size, heads, dim), device=device)
        self.post_mean = torch.zeros_like(self.mean) if layout.rope == "hybrid" else None
        self.fit_error = torch.full((batch_size, heads), torch.nan, device=device)
        self.error = self.fit_error.clone()
        self.outliers: Outliers | None = None
        if outlier_fraction:
            self.outliers = Outliers(batch_size, heads, dim, dtype, device)
        self.landmarks = Landmarks(layout, device) if landmarks else None
        self.fitted = [False] * batch_size
        self.marked = [False] * batch_size  # whether fit_error is known
        self.slots = [0] * batch_size
        self.inv_freq: Tensor | None = None
        self.set_first_position([0] * batch_size)
        self.set_pages([()] * batch_size)

    def set_first_position(self, first_position: list[int]) -> None:
        """Set the position of slot 0 of each sequence."""
        self.position = first_position
        self.first_position = _integers(first_position, self.device)

    @property
    def coding(self) -> tuple[str, ...]:
        """Names of the tensors that code and decode keys."""
        names = ("basis", "scale", "mean")
        return names if self.post_mean is None else (*names, "post_mean")

    def coding_of(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Basis, scale and mean of sequence b."""
        return self.basis[b], self.scale[b], self.mean[b]

    def tail_mean_of(self, b: int) -> Tensor | None:
        """The second mean of sequence b, for hybrid layouts."""
        return None if self.post_mean is None else self.post_mean[b]

    def tokens_after(self, sink_tokens: int) -> int:
        """Packed tokens of the longest sequence but for the first ones, which are exact rows."""
        return max(max(self.slots) - sink_tokens, 0)

    @property
    def used_pages(self) -> set[int]:
        """Rows of the pools that some sequence names."""
        return set().union(*self.pages)

    def fit(
        self,
        b: int,
        keys: Tensor,
        slot: int,
        clip: bool,
        bases: Bases | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """Fit sequence b's quantizer on its keys, ``[H, T, D]`` from slot ``slot`` on.

        ``bases`` are those of these keys, where they are known already; ``factor`` [H, 1, D] is
        what the keys are multiplied with first.
        """
        where = self.inv_freq, self.position[b] + slot
        core = Core.of(self.layout, self.inv_freq)
        if clip:  # ranges are searched on a sample anyway
            keys, *where = thinned(keys, *where)
        keys = scaled(keys, factor)
        if bases is None:
            bases = fit_bases(keys, core, *where, clip)
        fitted = fit_codes(keys, bases, self.layout, *where, clip)
        for name, value in zip(self.coding, fitted, strict=False):
            getattr(self, name)[b] = value
        self.fitted[b] = True

    def pack(
        self,
        b: int,
        keys: Tensor,
        values: Tensor,
        skip: int = 0,
        factor: Tensor | None = None,
    ) -> None:
        """Pack sequence b's next tokens, ``[H, T, D]`` keys and values, behind its packed slots.

        ``skip`` of them, sinks, are never seen: neither outliers nor signs of drift. ``factor``
        [H, 1, D] is what the keys are multiplied with first, a piece at a time.
        """
        slot, end = self.slots[b], self.slots[b] + keys.shape[1]
        self._extend_pages(b, end)
        table = torch.tensor(self.pages[b], dtype=torch.int32)  # pack stages read it on the host
        errors = []
        for piece in keys.split(keys.shape[1] if factor is None else PIECE_TOKENS, dim=1):
            errors.append(self._pack_keys(b, scaled(piece, factor), table, slot))
            slot += piece.shape[1]
        errors = errors[0] if len(errors) == 1 else torch.cat(errors, dim=1)
        slot = self.slots[b]
        ops.pack_values_(self.v_pages, values, self.layout, table, slot)
        self.slots[b] = end
        self.cache_seqlens[b] = end
        first, self.marked[b] = not self.marked[b], True
        if self.outliers is not None:
            fraction = self.outlier_fraction if first else None
            self.outliers.choose(b, keys, errors, slot, fraction, skip, factor)
        error = errors[:, skip:].mean(dim=1)
        if first:
            self.fit_error[b] = self.error[b] = error
        else:
            self.error[b] = DRIFT_MEMORY * self.error[b] + (1 - DRIFT_MEMORY) * error

    def _pack_keys(self, b: int, keys: Tensor, table: Tensor, slot: int) -> Tensor:
        """Pack keys [H, T, D] of sequence b from slot ``slot`` on; their squared errors [H, T]."""
        errors = torch.empty(keys.shape[:2], device=self.device)
        ops.pack_keys_(
            self.k_pages,
            keys,
            *self.coding_of(b),
            self.layout,
            table,
            slot,
            self.inv_freq,
            self.position[b] + slot,
            self.tail_mean_of(b),
            errors,
        )
        if self.landmarks is not None:
            self.landmarks.add(b, keys, slot, self)
        return errors

    def drift(self) -> Tensor:
        """Error of late over the error when the basis was fitted, mean over heads, [B]."""
        tiny = torch.finfo(torch.float32).tiny
        return (self.error / self.fit_error.clamp(min=tiny)).mean(dim=1)

    @normal_tensors
    def successor(self, keep: list[int]) -> PackedStore:
        """An empty store for the tokens that follow; sequences ``keep`` go on with their bases."""
        batch = len(self.slots)
        new = PackedStore(
            self.layout,
            batch,
            self.dtype,
            self.device,
            self.outlier_fraction,
            self.landmarks is not None,
        )
        new.inv_freq = self.inv_freq
        new.set_first_position([p + n for p, n in zip(self.position, self.slots, strict=True)])
        for b in keep:
            for name in (*self.coding, "fit_error", "error"):
                getattr(new, name)[b] = getattr(self, name)[b]
            if self.outliers is not None:
                new.outliers.least[b] = self.outliers.least[b]
            new.fitted[b], new.marked[b] = self.fitted[b], self.marked[b]
        return new

    @normal_tensors
    def reserve(self, num_pages: int) -> None:
        """Make room for this many more pages; the pools grow by at least an eighth."""
        have = self.k_pages.shape[0]
        missing = num_pages - (have - len(self.used_pages))
        if missing <= 0:
            return
        size = have + max(missing, have // 8)
        for name in ("k_pages", "v_pages"):
            old = getattr(self, name)
            new = old.new_empty((size, old.shape[1]))
            new[:have] = old
            setattr(self, name, new)
        if self.landmarks is not None:
            self.landmarks.resize(size)

    def truncate(self, b: int, slots: int) -> None:
        """Forget packed slots of sequence b from ``slots`` on; with the last of them its basis."""
        self.slots[b] = slots
        self.pages[b] = self.pages[b][: -(-slots // PAGE_TOKENS)]
        self.fitted[b] = self.fitted[b] and slots > 0
        if self.outliers is not None:
            self.outliers.truncate(b, slots)
        if not self.fitted[b]:
            self.marked[b] = False
            self.fit_error[b] = self.error[b] = torch.nan
        self.set_pages(self.pages)

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``, sharing its pages."""
        chosen = torch.tensor(indices, dtype=torch.long)
        for name in (*self.coding, "fit_error", "error"):
            setattr(self, name, getattr(self, name)[chosen])
        for name in ("fitted", "marked", "pages", "slots"):
            setattr(self, name, [getattr(self, name)[i] for i in indices])
        if self.outliers is not None:
            self.outliers.select(indices)
        self.set_first_position([self.position[i] for i in indices])
        self.set_pages(self.pages)

    @normal_tensors
    def compact(self) -> None:
        """Give pages back that no sequence names any more, once they are a quarter of the pools."""
        used = sorted(self.used_pages)
        have = self.k_pages.shape[0]
        if have - len(used) <= have // 4:
            return
        renumbered = {page: i for i, page in enumerate(used)}
        self.k_pages, self.v_pages = self.k_pages[used], self.v_pages[used]
        if self.landmarks is not None:
            self.landmarks.take(used)
        self.set_pages([tuple(renumbered[page] for page in pages) for pages in self.pages])

    def _extend_pages(self, b: int, end: int) -> None:
        """Give sequence b pages of its own for the slots from ``slots[b]`` to ``end``."""
        pages, slots = self.pages[b], self.slots[b]
        count = -(-end // PAGE_TOKENS)
        others = set().union(*self.pages[:b], *self.pages[b + 1 :])
        shared = slots % PAGE_TOKENS > 0 and pages[-1] in others
        if count == len(pages) and not shared:
            return
        self.reserve(count - len(pages) + shared)
        free = sorted(set(range(self.k_pages.shape[0])) - self.used_pages)
        if shared:
            copy = free.pop(0)
            self.k_pages[copy], self.v_pages[copy] = (
                self.k_pages[pages[-1]],
                self.v_pages[pages[-1]],
            )
            if self.landmarks is not None:
                self.landmarks.copy_page(pages[-1], copy)
            pages = (*pages[:-1], copy)
        self.pages[b] = (*pages, *free[: count - len(pages)])
        self.set_pages(self.pages)

    @normal_tensors
    def set_pages(self, pages: list[tuple[int, ...]]) -> None:
        """Set the pages of each sequence; ``page_table`` and ``cache_seqlens`` follow."""
        self.pages = pages
        longest = max((len(pages) for pages in self.pages), default=0)
        rows = [(*pages, *[0] * (longest - len(pages))) for pages in self.pages]
        self.page_table = _integers(rows, self.device).reshape(len(rows), longest)
        self.cache_seqlens = _integers(self.slots, self.device)


class ExactRows:
    """Exact keys and values of every sequence: sinks, then the window.

    Attributes
    ----------
    keys, values : [B, H, E, D] in the model's dtype; rotated keys.
    count : rows in use per sequence.
    lens : [B] int32, ``count`` as of the last :meth:`set_count`.
    """

    @normal_tensors
    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, num_kv_heads, 0, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.set_count([0] * batch_size)

    @property
    def capacity(self) -> int:
        """Rows allocated per sequence, E."""
        return self.keys.shape[2]

    def none(self) -> ExactRows:
        """The same without any rows."""
        batch, heads, _, dim = self.keys.shape
        return ExactRows(batch, heads, dim, self.keys.dtype, self.keys.device)

    def set_count(self, count: list[int]) -> None:
        """Say how many rows of each sequence are in use."""
        self.count = count
        self.lens = _integers(count, self.keys.device)

    def reserve(self, rows: int) -> None:
        """Make room for this many rows; grows by a quarter at least, so that appending is cheap."""
        if rows > self.capacity:
            self.resize(max(rows, self.capacity * 5 // 4))

    @normal_tensors
    def resize(self, rows: int) -> None:
        """Reallocate to this many rows, rounded up, keeping those in use."""
        size = -(-rows // ROW_STEP) * ROW_STEP
        used = max(self.count)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], size, old.shape[3]))
            new[:, :, :used] = old[:, :, :used]
            setattr(self, name, new)

    def write(self, b: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Write [H, T, D] keys and values, checked to be finite, to rows from ``start`` on."""
        if keys.shape[1]:
            ops.append_window_(self.keys[b], self.values[b], keys, values, start)

    def remove(self, b: int, start: int, stop: int) -> None:
        """Remove rows ``start .. stop - 1`` of sequence b, moving later rows down."""
        end = self.count[b]
        for rows in (self.keys[b], self.values[b]):
            moved = rows[:, stop:end]
            overlaps = end - stop > stop - start
            rows[:, start : start + end - stop] = moved.clone() if overlaps else moved
        self.count[b] -= stop - start

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        chosen = torch.tensor(indices, dtype=torch.long)
        self.keys, self.values = self.keys[chosen], self.values[chosen]
        self.set_count([self.count[i] for i in indices])
