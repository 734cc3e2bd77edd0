"""Selection of the packed tokens worth attending to, and their codes in pages of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.layout import NO_SLOT, PAGE_TOKENS, PageLayout, pages_of
from svdq.ops import KeyCodec, PackedKeys
from svdq.reference.keys import channel_widths, part_slices, rotate
from svdq.reference.pages import unpack_codes, write_codes_
from svdq.reference.values import value_parts, write_value_parts_

SAMPLE_PAGES = 64
SLOW_ANGLE = 1.0  # largest angle between a page's middle and its ends at which a pair counts


def proxy_slices(layout: PageLayout, channels: int) -> list[tuple[slice, slice]]:
    """Every head's first pre-RoPE and post-RoPE channels among the rows of the basis."""
    result = []
    for pre, post in zip(*part_slices(layout), strict=True):
        pre = slice(pre.start, min(pre.stop, pre.start + channels))
        left = channels - (pre.stop - pre.start)
        result.append((pre, slice(post.start, min(post.stop, post.start + left))))
    return result


def token_masses(
    query: Tensor,
    codes: Tensor,
    codec: KeyCodec,
    layout: PageLayout,
    sm_scale: float,
    *,
    channels: int,
    position: int = 0,
    sink_tokens: int = 0,
) -> Tensor:
    """Masses [H, T] of one sequence's slots for queries [Hq, L, D], from its codes [T, R].

    A head's first ``channels`` channels score every token as if it stood in the middle of its page,
    without the pairs that rotate too fast for that; a token's mass is the sum over the queries of
    its probability, relative to a sample of pages.
    """
    num_tokens, widths = codes.shape[0], channel_widths(layout)
    latent = (codes.double() - (2.0**widths - 1) / 2) * codec.scale.double()
    pages = pages_of(num_tokens)
    page = torch.arange(num_tokens) // PAGE_TOKENS
    middle = position + torch.arange(pages) * PAGE_TOKENS + PAGE_TOKENS // 2
    counts = torch.ones(layout.head_dim, dtype=torch.bool)
    if codec.inv_freq is not None:
        slow = codec.inv_freq <= SLOW_ANGLE / (PAGE_TOKENS / 2)
        counts[: 2 * codec.inv_freq.numel()] = slow.repeat(2)
    queries = query.double().unflatten(0, (layout.num_kv_heads, -1)).flatten(1, 2) * sm_scale
    basis, mean, masses = codec.basis.double(), codec.mean.double(), []
    post_mean = mean if codec.post_mean is None else codec.post_mean.double()
    for h, (pre, post) in enumerate(proxy_slices(layout, channels)):
        own = queries[h]
        score = own.new_zeros(own.shape[0], num_tokens)
        if layout.rope != "post":
            rotated = own[:, None].expand(-1, pages, -1)
            rotated = rotate(rotated, middle, codec.inv_freq, inverse=True) * counts
            rows = latent[:, pre] @ basis[pre] + mean[h]
            score += (rotated[:, page] * rows).sum(-1)
        if layout.rope != "pre":
            score += own @ (latent[:, post] @ basis[post] + post_mean[h]).T
        stride = max(-(-pages // SAMPLE_PAGES), 1)
        sampled = (page % stride == stride // 2) & (torch.arange(num_tokens) >= sink_tokens)
        norm = score[:, sampled].logsumexp(dim=1, keepdim=True)
        masses.append((score - norm.nan_to_num(neginf=0.0)).exp().sum(dim=0))
    return torch.stack(masses)


def select(
    query: Tensor, packed: PackedKeys, budget: int, sm_scale: float, *, channels: int = 16
) -> tuple[Tensor, Tensor]:
    """Slots of the largest masses, and outliers' indices; see :func:`svdq.ops.select`."""
    batch, heads = query.shape[0], packed.layout.num_kv_heads
    outlier_slots = packed.outlier_slots
    if outlier_slots is None:
        outlier_slots = torch.empty(batch, heads, 0, dtype=torch.int32)
    slots = torch.full((batch, heads, budget + outlier_slots.shape[2]), NO_SLOT, dtype=torch.int32)
    indices = torch.full_like(outlier_slots, NO_SLOT)
    for b in range(batch):
        count = int(packed.cache_seqlens[b])
        codes = unpack_codes(packed.k_pages, packed.layout, packed.page_table[b], 0, count)
        masses = token_masses(
            query[b],
            codes,
            packed.codec.sequence(b),
            packed.layout,
            sm_scale,
            channels=channels,
            position=int(packed.first_position[b]) if packed.first_position is not None else 0,
            sink_tokens=packed.sink_tokens,
        )
        masses[:, : packed.sink_tokens] = -1
        for h in range(heads):
            kept = outlier_slots[b, h]
            kept = kept[kept < count].long()
            masses[h, kept] = -1
            best = masses[h].sort(descending=True, stable=True).indices[:budget]
            chosen = torch.cat([best[masses[h, best] >= 0], kept]).sort().values
            slots[b, h, : len(chosen)] = chosen.int()
            indices[b, h, : len(kept)] = torch.searchsorted(chosen, kept).int()
    return slots, indices


def gather(packed: PackedKeys, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copy what the pages hold of these slots; see :func:`svdq.ops.gather`."""
    batch, heads, count = slots.shape
    layout, k_pages, v_pages = packed.layout, packed.k_pages, packed.v_pages
    pages = pages_of(count)
    k_out = k_pages.new_zeros(batch * pages, k_pages.shape[1])
    v_out = v_pages.new_zeros(batch * pages, v_pages.shape[1])
    pre, post = part_slices(layout)
    for b in range(batch):
        table = torch.arange(b * pages, (b + 1) * pages)
        stored = packed.page_table.shape[1] * PAGE_TOKENS
        codes = unpack_codes(k_pages, layout, packed.page_table[b], 0, stored)
        parts = value_parts(v_pages, layout, packed.page_table[b], 0, stored)
        new_codes = codes.new_zeros(count, layout.rank)
        new_parts = [x.new_zeros(heads, count, *x.shape[2:]) for x in parts]
        for h in range(heads):
            valid = (slots[b, h] < NO_SLOT).nonzero()[:, 0]
            own = slots[b, h, valid].long()
            for channels in (pre[h], post[h]):
                new_codes[valid, channels] = codes[own, channels]
            for new, old in zip(new_parts, parts, strict=True):
                new[h, valid] = old[h, own]
        write_codes_(k_out, new_codes, layout, table, 0)
        write_value_parts_(v_out, new_parts, layout, table, 0)
    return k_out, v_out
