"""Addresses of codes in pages, and the codes of keys."""

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


def used_rows(page_table: Tensor, slot: int, num_tokens: int) -> tuple[Tensor, slice]:
    """Rows of the pool that these slots touch, and where the slots lie in them laid end to end."""
    first = slot // PAGE_TOKENS
    rows = page_table[first : -(-(slot + num_tokens) // PAGE_TOKENS)].long()
    return rows, slice(slot - first * PAGE_TOKENS, slot - first * PAGE_TOKENS + num_tokens)


def write_codes_(
    k_pages: Tensor, codes: Tensor, layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Store codes [T, R]: the inverse of :func:`unpack_codes`; other slots keep theirs."""
    rows, slots = used_rows(page_table, slot, codes.shape[0])
    for columns, span, addresses, width in _bands(layout):
        band = read_codes(k_pages[rows, span], addresses, width).flatten(0, 1)
        band[slots] = codes[:, columns].long()
        k_pages[rows, span] = join_codes(band.unflatten(0, (-1, PAGE_TOKENS)), addresses)


def unpack_codes(
    k_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Read codes; see :func:`svdq.ops.unpack_codes`."""
    rows, slots = used_rows(page_table, slot, num_tokens)
    codes = torch.empty(num_tokens, layout.rank, dtype=torch.uint8)
    for columns, span, addresses, width in _bands(layout):
        codes[:, columns] = read_codes(k_pages[rows, span], addresses, width).flatten(0, 1)[slots]
    return codes
