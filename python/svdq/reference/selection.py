"""Which packed tokens a query is worth attending, and their codes in pages of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.reference.attention import NO_SLOT
from svdq.reference.keys import channel_widths, part_slices, rotate
from svdq.reference.pages import unpack_codes, value_parts, write_codes_, write_value_parts_

SAMPLE_PAGES = 64
SLOW_ANGLE = 1.0  # largest angle between a page's middle and its ends at which a pair counts


def select_weights(
    query: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    sm_scale: float,
    inv_freq: Tensor | None,
    position: int,
    sink_tokens: int,
    post_mean: Tensor | None,
    channels: int,
) -> Tensor:
    """Weights [H, T] of one sequence's slots for queries [Hq, L, D], from its codes [T, R].

    A head's first ``channels`` channels score every token as if it stood in the middle of its page,
    without the pairs that turn too fast for that; a token's weight is the sum over the queries of
    its probability, relative to a sample of pages.
    """
    num_tokens, widths = codes.shape[0], channel_widths(layout)
    latent = (codes.double() - (2.0**widths - 1) / 2) * scale.double()
    pages = -(-num_tokens // PAGE_TOKENS)
    page = torch.arange(num_tokens) // PAGE_TOKENS
    middle = position + torch.arange(pages) * PAGE_TOKENS + PAGE_TOKENS // 2
    counts = torch.ones(layout.head_dim, dtype=torch.bool)
    if inv_freq is not None:
        slow = inv_freq <= SLOW_ANGLE / (PAGE_TOKENS / 2)
        counts[: 2 * inv_freq.numel()] = slow.repeat(2)
    queries = query.double().unflatten(0, (layout.num_kv_heads, -1)).flatten(1, 2) * sm_scale
    weights = []
    for h, (core, tail) in enumerate(zip(*part_slices(layout), strict=True)):
        core = slice(core.start, min(core.stop, core.start + channels))
        tail = slice(tail.start, min(tail.stop, tail.start + channels - (core.stop - core.start)))
        own, rows = queries[h], torch.zeros(1, layout.head_dim, dtype=torch.float64)
        score = own.new_zeros(own.shape[0], num_tokens)
        if layout.rope != "post":
            turned = own[:, None].expand(-1, pages, -1)
            turned = rotate(turned, middle, inv_freq, inverse=True) * counts  # [rows, pages, D]
            rows = latent[:, core] @ basis[core].double() + mean[h].double()
            score += (turned[:, page] * rows).sum(-1)
        if layout.rope != "pre":
            own_mean = mean[h] if post_mean is None else post_mean[h]
            score += own @ (latent[:, tail] @ basis[tail].double() + own_mean.double()).T
        stride = max(-(-pages // SAMPLE_PAGES), 1)
        sampled = (page % stride == stride // 2) & (torch.arange(num_tokens) >= sink_tokens)
        norm = score[:, sampled].logsumexp(dim=1, keepdim=True)
        weights.append((score - norm.nan_to_num(neginf=0.0)).exp().sum(dim=0))
    return torch.stack(weights)


def select(
    query: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    budget: int,
    sm_scale: float,
    inv_freq: Tensor | None = None,
    first_position: Tensor | None = None,
    sink_tokens: int = 0,
    post_mean: Tensor | None = None,
    outlier_slots: Tensor | None = None,
    channels: int = 16,
) -> tuple[Tensor, Tensor]:
    """Slots of the largest weights, and outliers' places; see :func:`svdq.ops.select`."""
    batch, heads = query.shape[0], layout.num_kv_heads
    if outlier_slots is None:
        outlier_slots = torch.empty(batch, heads, 0, dtype=torch.int32)
    slots = torch.full((batch, heads, budget + outlier_slots.shape[2]), NO_SLOT, dtype=torch.int32)
    places = torch.full_like(outlier_slots, NO_SLOT)
    for b in range(batch):
        count = int(cache_seqlens[b])
        codes = unpack_codes(k_pages, layout, page_table[b], 0, count)
        weights = select_weights(
            query[b],
            codes,
            basis[b],
            scale[b],
            mean[b],
            layout,
            sm_scale,
            inv_freq,
            int(first_position[b]) if first_position is not None else 0,
            sink_tokens,
            None if post_mean is None else post_mean[b],
            channels,
        )
        weights[:, :sink_tokens] = -1
        for h in range(heads):
            kept = outlier_slots[b, h]
            kept = kept[kept < count].long()
            weights[h, kept] = -1
            best = weights[h].sort(descending=True, stable=True).indices[:budget]
            chosen = torch.cat([best[weights[h, best] >= 0], kept]).sort().values
            slots[b, h, : len(chosen)] = chosen.int()
            places[b, h, : len(kept)] = torch.searchsorted(chosen, kept).int()
    return slots, places


def gather(
    k_pages: Tensor, v_pages: Tensor, page_table: Tensor, slots: Tensor, layout: PageLayout
) -> tuple[Tensor, Tensor]:
    """Copy what the pages hold of these slots; see :func:`svdq.ops.gather`."""
    batch, heads, count = slots.shape
    pages = -(-count // PAGE_TOKENS)
    k_out = k_pages.new_zeros(batch * pages, k_pages.shape[1])
    v_out = v_pages.new_zeros(batch * pages, v_pages.shape[1])
    cores, tails = part_slices(layout)
    for b in range(batch):
        table = torch.arange(b * pages, (b + 1) * pages)
        stored = page_table.shape[1] * PAGE_TOKENS
        codes = unpack_codes(k_pages, layout, page_table[b], 0, stored)
        parts = value_parts(v_pages, layout, page_table[b], 0, stored)
        new_codes = codes.new_zeros(count, layout.rank)
        new_parts = [x.new_zeros(heads, count, x.shape[2]) for x in parts]
        for h in range(heads):
            there = (slots[b, h] < NO_SLOT).nonzero()[:, 0]
            own = slots[b, h, there].long()
            for channels in (cores[h], tails[h]):
                new_codes[there, channels] = codes[own, channels]
            for new, old in zip(new_parts, parts, strict=True):
                new[h, there] = old[h, own]
        write_codes_(k_out, new_codes, layout, table, 0)
        write_value_parts_(v_out, new_parts, layout, table, 0)
    return k_out, v_out
