"""The pool of pages of one layer, and the pages that each of its sequences names."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from svdq.layout import PAGE_TOKENS, PageLayout, pages_of
from svdq.ops.tensors import int32_tensor, normal_tensors


class PageData(Protocol):
    """Further data of every page, which moves with it."""

    def resize(self, pages: int) -> None:
        """Make room for this many pages, keeping those there are."""

    def take(self, pages: list[int]) -> None:
        """Keep these pages alone, in this order."""

    def copy_page(self, source: int, target: int) -> None:
        """Make page ``target`` a copy of page ``source``."""


class PagePool:
    """Pages of one layer, shared by its sequences.

    A page is never written again once its 64 slots are full, so sequences that were copied from one
    another (beams) name the same pages; a page that is part full is copied before one of its owners
    goes on filling it. Giving a sequence pages takes time for these pages alone, however many there
    are.

    Attributes
    ----------
    k_pages, v_pages : [P, bytes] uint8 (values of 16 or 32 bits: [P, numbers] in ``dtype``).
    pages, page_table : the pages of each sequence in order, as lists and as [B, N] int32, with room
        to grow.
    slots, cache_seqlens : packed slots of each sequence, as a list and as [B] int32.
    """

    @normal_tensors
    def __init__(
        self,
        layout: PageLayout,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        page_data: PageData | None = None,
    ) -> None:
        self.device, self._page_data = device, page_data
        packed_values = layout.packs_values
        v_dtype = torch.uint8 if packed_values else dtype
        v_page = layout.num_kv_heads * PAGE_TOKENS * layout.head_dim
        if packed_values:
            v_page = layout.v_page_bytes
        self.k_pages = torch.empty((0, layout.k_page_bytes), dtype=torch.uint8, device=device)
        self.v_pages = torch.empty((0, v_page), dtype=v_dtype, device=device)
        self.slots = [0] * batch_size
        self.set_pages([[] for _ in range(batch_size)])

    @property
    def size(self) -> int:
        """Pages allocated, P."""
        return self.k_pages.shape[0]

    @property
    def used_pages(self) -> list[int]:
        """Rows of the pools that some sequence names, ascending."""
        return [page for page, owners in enumerate(self._owners) if owners]

    @property
    def num_used(self) -> int:
        """How many rows of the pools some sequence names."""
        return self.size - len(self._free)

    @normal_tensors
    def set_pages(self, pages: list[list[int]]) -> None:
        """Set the pages of each sequence; all else but the pools follows."""
        self.pages = pages
        self._owners = [0] * self.size
        for page in (page for own in pages for page in own):
            self._owners[page] += 1
        self._free = [page for page in range(self.size - 1, -1, -1) if not self._owners[page]]
        longest = max(map(len, pages), default=0)
        rows = [[*own, *[0] * (longest - len(own))] for own in pages]
        self.page_table = int32_tensor(rows, self.device).reshape(len(rows), longest)
        self.cache_seqlens = int32_tensor(self.slots, self.device)

    def set_slots(self, b: int, slots: int) -> None:
        """Set the packed slots of sequence b, whose pages hold them."""
        self.slots[b] = slots
        self.cache_seqlens[b] = slots

    def host_table(self, b: int) -> Tensor:
        """Page table [N] of sequence b on the CPU, where the pack and unpack stages read it."""
        if self.page_table.device.type == "cpu":
            return self.page_table[b]
        return int32_tensor(self.pages[b], torch.device("cpu"))

    @normal_tensors
    def reserve(self, num_pages: int, longest: int = 0) -> None:
        """Make room for this many more pages, and tables for ``longest`` pages of a sequence.

        The pools and the tables grow by at least an eighth.
        """
        missing = num_pages - len(self._free)
        if missing > 0:
            have, size = self.size, self.size + max(missing, self.size // 8)
            for name in ("k_pages", "v_pages"):
                old = getattr(self, name)
                new = old.new_empty((size, old.shape[1]))
                new[:have] = old
                setattr(self, name, new)
            if self._page_data is not None:
                self._page_data.resize(size)
            self._owners += [0] * (size - have)
            self._free = [*range(size - 1, have - 1, -1), *self._free]
        columns = self.page_table.shape[1]
        if longest > columns:
            longest = max(longest, columns + columns // 8)
            self.page_table = nn.functional.pad(self.page_table, (0, longest - columns))

    def extend(self, b: int, end: int) -> None:
        """Give sequence b pages of its own for the slots from ``slots[b]`` to ``end``."""
        own, slots = self.pages[b], self.slots[b]
        count = pages_of(end)
        shared = slots % PAGE_TOKENS > 0 and self._owners[own[-1]] > 1
        if count == len(own) and not shared:
            return
        self.reserve(count - len(own) + shared, count)
        first = len(own)
        if shared:
            first, source = first - 1, own.pop()
            self._owners[source] -= 1
            copy = self._take(b)
            for pool in (self.k_pages, self.v_pages):
                pool[copy] = pool[source]
            if self._page_data is not None:
                self._page_data.copy_page(source, copy)
        while len(own) < count:
            self._take(b)
        self.page_table[b, first:count] = int32_tensor(own[first:], self.device)

    def _take(self, b: int) -> int:
        """A free page, which becomes the last of sequence b."""
        page = self._free.pop()
        self._owners[page] = 1
        self.pages[b].append(page)
        return page

    def truncate(self, b: int, slots: int) -> None:
        """Forget packed slots of sequence b from ``slots`` on."""
        self.set_slots(b, slots)
        own = self.pages[b]
        while len(own) > pages_of(slots):
            page = own.pop()
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)

    def select(self, indices: list[int]) -> None:
        """Make sequence i name the pages of the old sequence ``indices[i]``."""
        self.slots = [self.slots[i] for i in indices]
        self.set_pages([list(self.pages[i]) for i in indices])

    @normal_tensors
    def spread(self, pages: int) -> None:
        """Give sequence b pages ``pages * b`` and on, as many, so that it grows without the host.

        Its table names all of them; those it does not use yet stay free.
        """
        batch = len(self.pages)
        runs = [range(pages * b, pages * (b + 1)) for b in range(batch)]
        used = [list(run[: len(own)]) for run, own in zip(runs, self.pages, strict=True)]
        if self.size != pages * batch or used != self.pages:
            source = [page for own in self.pages for page in own]
            target = [page for own in used for page in own]
            for name in ("k_pages", "v_pages"):
                old = getattr(self, name)
                new = old.new_empty((pages * batch, old.shape[1]))
                new[target] = old[source]
                setattr(self, name, new)
        self.set_pages(used)
        table = torch.arange(pages * batch, dtype=torch.int32, device=self.device)
        self.page_table = table.view(batch, pages)

    def grown(self, slots: list[int]) -> None:
        """Take note of slots that the device has packed since :meth:`spread`."""
        self.slots = slots
        columns = self.page_table.shape[1]
        self.pages = [
            list(range(columns * b, columns * b + pages_of(n))) for b, n in enumerate(slots)
        ]
        self._owners = [0] * self.size
        for page in (page for own in self.pages for page in own):
            self._owners[page] = 1
        self._free = [page for page in range(self.size - 1, -1, -1) if not self._owners[page]]

    @normal_tensors
    def compact(self) -> None:
        """Give pages back that no sequence names any more, once they are a quarter of the pools."""
        if len(self._free) <= self.size // 4:
            return
        used = self.used_pages
        renumbered = {page: i for i, page in enumerate(used)}
        self.k_pages, self.v_pages = self.k_pages[used], self.v_pages[used]
        if self._page_data is not None:
            self._page_data.take(used)
        self.set_pages([[renumbered[page] for page in pages] for pages in self.pages])
