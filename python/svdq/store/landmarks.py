"""Mean keys of chunks, which choose what is attended the way ShadowKV does (arXiv 2410.21465)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svdq import ops
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.store.outliers import NO_SLOT
from svdq.store.tensors import normal_tensors

if TYPE_CHECKING:
    from svdq.store.packed import PackedStore

CHUNK_TOKENS = 8
PAGE_CHUNKS = PAGE_TOKENS // CHUNK_TOKENS
TOP = 15  # largest of a landmark's 4-bit codes
OUTLIER_SHARE = 0.003  # of the chunks: those whose mean tells least of their keys


class Landmarks:
    """Landmarks of a store's pages: one for 8 tokens and head, in 4 bits.

    Attributes
    ----------
    codes : [P, H, 8, D / 2] uint8, two numbers a byte.
    scale, low : [P, H, 8] float16, step and least number of each landmark.
    similarity : [P, H, 8] float16, least cosine between the landmark and a key of its chunk.
    """

    NAMES = ("codes", "scale", "low", "similarity")

    @normal_tensors
    def __init__(self, layout: PageLayout, device: torch.device) -> None:
        heads = layout.num_kv_heads
        shape = (0, heads, PAGE_CHUNKS)
        self.codes = torch.empty((*shape, layout.head_dim // 2), dtype=torch.uint8, device=device)
        self.scale, self.low, self.similarity = (
            torch.empty(shape, dtype=torch.float16, device=device) for _ in range(3)
        )

    @normal_tensors
    def resize(self, pages: int) -> None:
        """Make room for this many pages, keeping those there are."""
        for name in self.NAMES:
            old = getattr(self, name)
            new = old.new_zeros((pages, *old.shape[1:]))
            new[: old.shape[0]] = old
            setattr(self, name, new)

    @normal_tensors
    def take(self, pages: list[int]) -> None:
        """Keep these pages alone, in this order."""
        for name in self.NAMES:
            setattr(self, name, getattr(self, name)[pages])

    def copy_page(self, source: int, target: int) -> None:
        """Make page ``target`` a copy of page ``source``."""
        for name in self.NAMES:
            getattr(self, name)[target] = getattr(self, name)[source]

    def scan_bytes(self, slots: int) -> int:
        """Bytes that scoring this many slots reads."""
        _, heads, chunks, half = self.codes.shape
        page = heads * chunks * (half + 3 * self.scale.itemsize)
        return -(-slots // PAGE_TOKENS) * page

    def add(self, b: int, keys: Tensor, slot: int, store: PackedStore) -> None:
        """Take the keys [H, T, D] that sequence b packs from slot ``slot`` on."""
        start = slot - slot % CHUNK_TOKENS
        if start < slot:  # a chunk that is part full: of its old keys there are codes alone
            table = torch.tensor(store.pages[b], dtype=torch.int32)
            old = ops.unpack_keys(
                store.k_pages,
                *store.coding_of(b),
                store.layout,
                table,
                start,
                slot - start,
                store.inv_freq,
                store.position[b] + start,
                store.tail_mean_of(b),
            )
            keys = torch.cat([old.to(keys.dtype), keys], dim=1)
        count = keys.shape[1]
        chunks = -(-count // CHUNK_TOKENS)
        # The last chunk may be part full: its last key stands for those to come.
        index = torch.arange(chunks * CHUNK_TOKENS, device=keys.device).clamp(max=count - 1)
        keys = keys[:, index].float().unflatten(1, (chunks, CHUNK_TOKENS))
        own = (torch.arange(chunks * CHUNK_TOKENS, device=keys.device) < count).view(chunks, -1, 1)
        mean = (keys * own).sum(2) / own.sum(1)
        cosine = torch.cosine_similarity(keys, mean[:, :, None], dim=3)
        low, high = mean.aminmax(dim=2)
        low, scale = low.half(), ((high - low) / TOP).half()
        steps = (mean - low[..., None].float()) / scale[..., None].float().clamp(min=1e-8)
        codes = steps.round().clamp(0, TOP).byte()
        place = start // CHUNK_TOKENS + torch.arange(chunks)
        pages = torch.tensor(store.pages[b])[place // PAGE_CHUNKS].to(keys.device)
        within = (place % PAGE_CHUNKS).to(keys.device)
        self.codes[pages, :, within] = (codes[..., ::2] | codes[..., 1::2] << 4).transpose(0, 1)
        for pool, x in (
            (self.scale, scale),
            (self.low, low),
            (self.similarity, cosine.amin(2).half()),
        ):
            pool[pages, :, within] = x.mT

    def decode(self, pages: Tensor) -> Tensor:
        """Landmarks [H, chunks, D] float32 of these pages in their order."""
        codes = self.codes[pages]
        numbers = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).float()
        decoded = (
            numbers * self.scale[pages].float()[..., None] + self.low[pages].float()[..., None]
        )
        return decoded.transpose(0, 1).flatten(1, 2)

    def select(
        self, query: Tensor, store: PackedStore, budget: int, scaling: float, sinks: int
    ) -> tuple[Tensor, Tensor]:
        """Slots of the best chunks and the outliers; as :func:`svdq.ops.select` returns them.

        A chunk's weight is the sum of its probabilities over the queries of a KV head. Chunks that
        their mean describes worst come first.
        """
        batch, heads = query.shape[0], store.layout.num_kv_heads
        device = query.device
        outliers = query.new_empty((batch, heads, 0), dtype=torch.int32)
        if store.outliers is not None:
            outliers = store.outliers.slots
        count = budget + outliers.shape[2]
        slots = torch.full((batch, heads, count), NO_SLOT, dtype=torch.int32, device=device)
        places = torch.full_like(outliers, NO_SLOT)
        for b in range(batch):
            chosen = self._best_chunks(query[b], store, b, budget, scaling, sinks)
            all_slots = torch.cat([chosen, outliers[b]], dim=1).sort(dim=1).values
            again = torch.zeros_like(all_slots, dtype=torch.bool)
            again[:, 1:] = all_slots[:, 1:] == all_slots[:, :-1]
            all_slots = all_slots.masked_fill(again, NO_SLOT).sort(dim=1).values[:, :count]
            slots[b, :, : all_slots.shape[1]] = all_slots
            found = torch.searchsorted(all_slots, outliers[b]).int()
            places[b] = torch.where(outliers[b] == NO_SLOT, NO_SLOT, found)
        return slots, places

    def _best_chunks(
        self, query: Tensor, store: PackedStore, b: int, budget: int, scaling: float, sinks: int
    ) -> Tensor:
        """Slots [H, n] of sequence b's best chunks for queries [Hq, L, D], at most ``budget``."""
        heads, device = store.layout.num_kv_heads, query.device
        pages = torch.tensor(store.pages[b], device=device, dtype=torch.long)
        chunks = -(-store.slots[b] // CHUNK_TOKENS)
        landmarks = self.decode(pages)[:, :chunks]
        rows = query.float().unflatten(0, (heads, -1)).flatten(1, 2) * scaling
        scores = rows @ landmarks.mT
        scores[:, :, : sinks // CHUNK_TOKENS] = -torch.inf
        weight = scores.softmax(dim=2).sum(dim=1)
        similarity = self.similarity[pages].transpose(0, 1).flatten(1, 2)[:, :chunks].float()
        worst = similarity.topk(int(OUTLIER_SHARE * chunks), dim=1, largest=False).indices
        weight.scatter_(1, worst, torch.inf)
        weight[:, : sinks // CHUNK_TOKENS] = -1
        best = weight.topk(min(max(budget // CHUNK_TOKENS, 1), chunks), dim=1).indices
        slots = best[..., None] * CHUNK_TOKENS + torch.arange(CHUNK_TOKENS, device=device)
        slots = slots.flatten(1)
        seen = (slots >= sinks) & (slots < store.slots[b])
        return torch.where(seen, slots, NO_SLOT).int().sort(dim=1).values[:, :budget]
