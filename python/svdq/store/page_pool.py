"""The pool of pages of one layer, and the pages that each of its sequences names."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

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
    goes on filling it.

    Attributes
    ----------
    k_pages, v_pages : [P, bytes] uint8 (values of 16 or 32 bits: [P, numbers] in ``dtype``).
    pages, page_table : the pages of each sequence in order, as tuples and as [B, N] int32.
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
        self.set_pages([()] * batch_size)

    @property
    def size(self) -> int:
        """Pages allocated, P."""
        return self.k_pages.shape[0]

    @property
    def used_pages(self) -> set[int]:
        """Rows of the pools that some sequence names."""
        return set().union(*self.pages)

    @normal_tensors
    def set_pages(self, pages: list[tuple[int, ...]]) -> None:
        """Set the pages of each sequence; ``page_table`` and ``cache_seqlens`` follow."""
        self.pages = pages
        longest = max((len(pages) for pages in self.pages), default=0)
        rows = [(*pages, *[0] * (longest - len(pages))) for pages in self.pages]
        self.page_table = int32_tensor(rows, self.device).reshape(len(rows), longest)
        self.cache_seqlens = int32_tensor(self.slots, self.device)

    def set_slots(self, b: int, slots: int) -> None:
        """Set the packed slots of sequence b, whose pages hold them."""
        self.slots[b] = slots
        self.cache_seqlens[b] = slots

    def host_table(self, b: int) -> Tensor:
        """Page table [N] of sequence b on the CPU, where the pack and unpack stages read it."""
        return torch.tensor(self.pages[b], dtype=torch.int32)

    @normal_tensors
    def reserve(self, num_pages: int) -> None:
        """Make room for this many more pages; the pools grow by at least an eighth."""
        missing = num_pages - (self.size - len(self.used_pages))
        if missing <= 0:
            return
        have, size = self.size, self.size + max(missing, self.size // 8)
        for name in ("k_pages", "v_pages"):
            old = getattr(self, name)
            new = old.new_empty((size, old.shape[1]))
            new[:have] = old
            setattr(self, name, new)
        if self._page_data is not None:
            self._page_data.resize(size)

    def extend(self, b: int, end: int) -> None:
        """Give sequence b pages of its own for the slots from ``slots[b]`` to ``end``."""
        pages, slots = self.pages[b], self.slots[b]
        count = pages_of(end)
        others = set().union(*self.pages[:b], *self.pages[b + 1 :])
        shared = slots % PAGE_TOKENS > 0 and pages[-1] in others
        if count == len(pages) and not shared:
            return
        self.reserve(count - len(pages) + shared)
        free = sorted(set(range(self.size)) - self.used_pages)
        if shared:
            source, copy = pages[-1], free.pop(0)
            for pool in (self.k_pages, self.v_pages):
                pool[copy] = pool[source]
            if self._page_data is not None:
                self._page_data.copy_page(source, copy)
            pages = (*pages[:-1], copy)
        self.pages[b] = (*pages, *free[: count - len(pages)])
        self.set_pages(self.pages)

    def truncate(self, b: int, slots: int) -> None:
        """Forget packed slots of sequence b from ``slots`` on."""
        self.slots[b] = slots
        self.pages[b] = self.pages[b][: pages_of(slots)]
        self.set_pages(self.pages)

    def select(self, indices: list[int]) -> None:
        """Make sequence i name the pages of the old sequence ``indices[i]``."""
        self.slots = [self.slots[i] for i in indices]
        self.set_pages([self.pages[i] for i in indices])

    @normal_tensors
    def compact(self) -> None:
        """Give pages back that no sequence names any more, once they are a quarter of the pools."""
        used = sorted(self.used_pages)
        if self.size - len(used) <= self.size // 4:
            return
        renumbered = {page: i for i, page in enumerate(used)}
        self.k_pages, self.v_pages = self.k_pages[used], self.v_pages[used]
        if self._page_data is not None:
            self._page_data.take(used)
        self.set_pages([tuple(renumbered[page] for page in pages) for pages in self.pages])
