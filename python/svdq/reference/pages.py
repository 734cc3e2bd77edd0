"""Addresses of codes and values in pages, and the quantized values themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svdq import _C
from svdq.layout import PAGE_TOKENS, WIDTHS, PageLayout

LANES, QUAD = 16, 4  # a line of codes is 16 lanes of 4 bytes

# Codes in pages. A tile is 64 codes of one width, 4 in each of 16 lanes; a line, 8 / width tiles.


def _addresses(tile: Tensor, lane: Tensor, element: Tensor, width: int) -> tuple[Tensor, Tensor]:
    per_line = 8 // width
    byte = tile // per_line * LANES * QUAD + lane * QUAD + element
    return byte, (tile % per_line * width).expand_as(byte)


def key_code_addresses(width: int, num_channels: int) -> tuple[Tensor, Tensor]:
    """Byte and shift of the codes of one band, [64, num_channels] by slot and channel."""
    token, channel = torch.arange(PAGE_TOKENS)[:, None], torch.arange(num_channels)
    tile = channel // QUAD * (PAGE_TOKENS // LANES) + token // LANES
    return _addresses(tile, token % LANES, channel % QUAD, width)


def value_code_addresses(width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Byte and shift of the codes of one head's values, [64, head_dim] by slot and channel."""
    token, channel = torch.arange(PAGE_TOKENS)[:, None], torch.arange(head_dim)
    tile = channel // LANES * (PAGE_TOKENS // QUAD) + token // QUAD
    return _addresses(tile, channel % LANES, token % QUAD, width)


def read_codes(pages: Tensor, addresses: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Codes [..., 64, n] of the bytes [..., size] of a band."""
    byte, shift = addresses
    return (pages.long()[..., byte] >> shift) & (2**width - 1)


def join_codes(codes: Tensor, addresses: tuple[Tensor, Tensor]) -> Tensor:
    """Inverse of :func:`read_codes`: every byte is the sum of its shifted codes."""
    byte, shift = (x.flatten() for x in addresses)
    shifted = codes.flatten(-2) << shift
    pages = shifted.new_zeros(*shifted.shape[:-1], int(byte.max()) + 1)
    return pages.index_add_(-1, byte, shifted).byte()


def _bands(layout: PageLayout) -> Iterator[tuple]:
    """Of every band of every head: columns of the codes, bytes of a page, addresses and width."""
    channel, byte = 0, 0
    parts = [bands for head in layout.head_bands for bands in head]
    for count, width in ((n, w) for bands in parts for n, w in zip(bands, WIDTHS, strict=True)):
        size = _C.format.band_bytes(width, count)
        if count:
            span = slice(channel, channel + count), slice(byte, byte + size)
            yield *span, key_code_addresses(width, count), width
        channel, byte = channel + count, byte + size


def _rows(page_table: Tensor, slot: int, num_tokens: int) -> tuple[Tensor, slice]:
    """Rows of the pool that these slots touch, and where the slots lie in them laid end to end."""
    first = slot // PAGE_TOKENS
    rows = page_table[first : -(-(slot + num_tokens) // PAGE_TOKENS)].long()
    return rows, slice(slot - first * PAGE_TOKENS, slot - first * PAGE_TOKENS + num_tokens)


def write_codes_(
    k_pages: Tensor, codes: Tensor, layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Store codes [T, R]: the inverse of :func:`unpack_codes`; other slots keep theirs."""
    rows, slots = _rows(page_table, slot, codes.shape[0])
    for columns, span, addresses, width in _bands(layout):
        band = read_codes(k_pages[rows, span], addresses, width).flatten(0, 1)
        band[slots] = codes[:, columns].long()
        k_pages[rows, span] = join_codes(band.unflatten(0, (-1, PAGE_TOKENS)), addresses)


def unpack_codes(
    k_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Read codes; see :func:`svdq.ops.unpack_codes`."""
    rows, slots = _rows(page_table, slot, num_tokens)
    codes = torch.empty(num_tokens, layout.rank, dtype=torch.uint8)
    for columns, span, addresses, width in _bands(layout):
        codes[:, columns] = read_codes(k_pages[rows, span], addresses, width).flatten(0, 1)[slots]
    return codes


# Values: per token and group of channels, v = zero + code * scale.


def _by_slot(pages: Tensor) -> Tensor:
    """[pages, H, 64, n] -> [H, slots, n]."""
    return pages.transpose(0, 1).flatten(1, 2)


def _by_page(slots: Tensor) -> Tensor:
    """[H, slots, n] -> [pages, H, 64, n]."""
    return slots.unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1)


def _value_parts(v_pages: Tensor, rows: Tensor, layout: PageLayout) -> list[Tensor]:
    """Scales and zero points [H, slots, groups] half and codes [H, slots, D], or full values."""
    pages = v_pages[rows].unflatten(1, (layout.num_kv_heads, -1))
    if layout.v_bits > 8:
        return [_by_slot(pages.unflatten(2, (PAGE_TOKENS, -1)))]
    size = layout.head_dim // layout.v_group_size * PAGE_TOKENS * 2
    *halves, codes = pages.split([size, size, pages.shape[2] - 2 * size], dim=2)
    halves = [x.contiguous().view(torch.half).unflatten(2, (-1, PAGE_TOKENS)).mT for x in halves]
    addresses = value_code_addresses(layout.v_bits, layout.head_dim)
    return [_by_slot(x) for x in (*halves, read_codes(codes, addresses, layout.v_bits))]


def value_parts(
    v_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> list[Tensor]:
    """Stored parts of these slots: scales, zero points and codes, or values of 16 or 32 bits."""
    rows, slots = _rows(page_table, slot, num_tokens)
    return [part[:, slots] for part in _value_parts(v_pages, rows, layout)]


def quantize_values(values: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero point [H, T, groups] half and codes before rounding, [H, T, D] float64."""
    # The range is taken in float32, so that its rounding to half has one outcome everywhere.
    grouped = values.float().unflatten(-1, (-1, layout.v_group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    top = 2**layout.v_bits - 1
    scale, zero = ((high - low) / top).half(), low.half()
    steps = (grouped.double() - zero.double()[..., None]) / scale.double()[..., None]
    return scale, zero, torch.where(scale[..., None] > 0, steps, 0.0).clamp(0, top).flatten(-2)


def pack_values_(
    v_pages: Tensor, values: Tensor, layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Quantize or copy values; see :func:`svdq.ops.pack_values_`."""
    if layout.v_bits > 8:
        write_value_parts_(v_pages, [values], layout, page_table, slot)
        return
    scale, zero, codes = quantize_values(values, layout)
    write_value_parts_(v_pages, [scale, zero, codes.round()], layout, page_table, slot)


def write_value_parts_(
    v_pages: Tensor, parts: list[Tensor], layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Store parts [H, T, n] of values: the inverse of :func:`value_parts`."""
    rows, slots = _rows(page_table, slot, parts[0].shape[1])
    stored = _value_parts(v_pages, rows, layout)
    for all_slots, part in zip(stored, parts, strict=True):
        all_slots[:, slots] = part.to(all_slots.dtype)
    if layout.v_bits > 8:
        v_pages[rows] = _by_page(stored[0]).flatten(1)
        return
    scale, zero, codes = stored
    halves = [_by_page(x).mT.flatten(2).view(torch.uint8) for x in (scale, zero)]
    codes = join_codes(_by_page(codes), value_code_addresses(layout.v_bits, layout.head_dim))
    v_pages[rows] = torch.cat([*halves, codes], dim=2).flatten(1)


def unpack_values(
    v_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Decode values; see :func:`svdq.ops.unpack_values`."""
    parts = value_parts(v_pages, layout, page_table, slot, num_tokens)
    if layout.v_bits > 8:
        return parts[0].float()
    scale, zero, codes = (part.double() for part in parts)
    grouped = codes.unflatten(2, (-1, layout.v_group_size))
    return (zero[..., None] + grouped * scale[..., None]).flatten(2).float()
