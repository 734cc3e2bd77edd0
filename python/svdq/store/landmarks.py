"""Mean keys of chunks, which choose packed tokens the way ShadowKV does (arXiv 2410.21465)."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.layout import NO_SLOT, PAGE_TOKENS, PageLayout, pages_of
from svdq.ops import PackedKeys
from svdq.ops.tensors import normal_tensors

CHUNK_TOKENS = 8
PAGE_CHUNKS = PAGE_TOKENS // CHUNK_TOKENS
TOP_CODE = 15  # largest of a landmark's 4-bit codes
OUTLIER_SHARE = 0.003  # of the chunks: those whose mean tells least of their keys


class Landmarks:
    """Landmarks of a store's pages: one for 8 tokens and head, in 4 bits.

    Attributes
    ----------
    codes : [P, H, 8, D / 2] uint8, two numbers a byte.
    scale, low : [P, H, 8] float16, distance of neighbouring codes and smallest number.
    similarity : [P, H, 8] float16, smallest cosine between the landmark and a key of its chunk.
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
        _, heads, chunks, code_bytes = self.codes.shape
        page = heads * chunks * (code_bytes + 3 * self.scale.itemsize)
        return pages_of(slots) * page

    def add(self, keys: Tensor, pages: list[int], start: int) -> None:
        """Take the keys [H, T, D] of a sequence with these pages, from slot ``start`` on.

        ``start`` is the first slot of a chunk. The last chunk may be part full.
        """
        count = keys.shape[1]
        chunks = -(-count // CHUNK_TOKENS)
        # The last key stands for those to come.
        index = torch.arange(chunks * CHUNK_TOKENS, device=keys.device).clamp(max=count - 1)
        keys = keys[:, index].float().unflatten(1, (chunks, CHUNK_TOKENS))
        own = (torch.arange(chunks * CHUNK_TOKENS, device=keys.device) < count).view(chunks, -1, 1)
        mean = (keys * own).sum(2) / own.sum(1)
        cosine = torch.cosine_similarity(keys, mean[:, :, None], dim=3)
        low, high = mean.aminmax(dim=2)
        low, scale = low.half(), ((high - low) / TOP_CODE).half()
        steps = (mean - low[..., None].float()) / scale[..., None].float().clamp(min=1e-8)
        codes = steps.round().clamp(0, TOP_CODE).byte()
        chunk = start // CHUNK_TOKENS + torch.arange(chunks)
        page = torch.tensor(pages)[chunk // PAGE_CHUNKS].to(keys.device)
        within = (chunk % PAGE_CHUNKS).to(keys.device)
        self.codes[page, :, within] = (codes[..., ::2] | codes[..., 1::2] << 4).transpose(0, 1)
        for pool, x in (
            (self.scale, scale),
            (self.low, low),
            (self.similarity, cosine.amin(2).half()),
        ):
            pool[page, :, within] = x.mT

    def decode(self, pages: Tensor) -> Tensor:
        """Landmarks [H, chunks, D] float32 of these pages in their order."""
        codes = self.codes[pages]
        numbers = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).float()
        decoded = (
            numbers * self.scale[pages].float()[..., None] + self.low[pages].float()[..., None]
        )
        return decoded.transpose(0, 1).flatten(1, 2)

    def select(
        self, query: Tensor, packed: PackedKeys, slots: list[int], budget: int, sm_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Slots of the best chunks and the outliers; as :func:`svdq.ops.select` returns them.

        A chunk's mass is the sum of its probabilities over the queries of a KV head. Chunks that
        their mean describes worst come first. ``slots`` are the packed slots of each sequence.
        """
        batch, heads = query.shape[0], packed.layout.num_kv_heads
        device = query.device
        outliers = packed.outlier_slots
        if outliers is None:
            outliers = query.new_empty((batch, heads, 0), dtype=torch.int32)
        count = budget + outliers.shape[2]
        selected = torch.full((batch, heads, count), NO_SLOT, dtype=torch.int32, device=device)
        indices = torch.full_like(outliers, NO_SLOT)
        for b in range(batch):
            pages = packed.page_table[b, : pages_of(slots[b])].long()
            chosen = self._best_chunks(
                query[b], pages, slots[b], budget, sm_scale, packed.sink_tokens
            )
            all_slots = torch.cat([chosen, outliers[b]], dim=1).sort(dim=1).values
            again = torch.zeros_like(all_slots, dtype=torch.bool)
            again[:, 1:] = all_slots[:, 1:] == all_slots[:, :-1]
            all_slots = all_slots.masked_fill(again, NO_SLOT).sort(dim=1).values[:, :count]
            selected[b, :, : all_slots.shape[1]] = all_slots
            found = torch.searchsorted(all_slots, outliers[b]).int()
            indices[b] = torch.where(outliers[b] == NO_SLOT, NO_SLOT, found)
        return selected, indices

    def _best_chunks(
        self, query: Tensor, pages: Tensor, count: int, budget: int, sm_scale: float, sinks: int
    ) -> Tensor:
        """Slots [H, n] of one sequence's best chunks for queries [Hq, L, D], at most ``budget``.

        The sequence has ``count`` packed slots in ``pages``.
        """
        heads, device = self.codes.shape[1], query.device
        chunks = -(-count // CHUNK_TOKENS)
        landmarks = self.decode(pages)[:, :chunks]
        queries = query.float().unflatten(0, (heads, -1)).flatten(1, 2) * sm_scale
        scores = queries @ landmarks.mT
        scores[:, :, : sinks // CHUNK_TOKENS] = -torch.inf
        mass = scores.softmax(dim=2).sum(dim=1)
        similarity = self.similarity[pages].transpose(0, 1).flatten(1, 2)[:, :chunks].float()
        worst = similarity.topk(int(OUTLIER_SHARE * chunks), dim=1, largest=False).indices
        mass.scatter_(1, worst, torch.inf)
        mass[:, : sinks // CHUNK_TOKENS] = -1
        best = mass.topk(min(max(budget // CHUNK_TOKENS, 1), chunks), dim=1).indices
        slots = best[..., None] * CHUNK_TOKENS + torch.arange(CHUNK_TOKENS, device=device)
        slots = slots.flatten(1)
        valid = (slots >= sinks) & (slots < count)
        return torch.where(valid, slots, NO_SLOT).int().sort(dim=1).values[:, :budget]
