"""Values as they are coded (kernels/rotation.h), from the formulas alone.

With the rotation Q of a head's values x and y = Q x, codes of b bits c and mid = (2^b - 1) / 2:

    c = round(y / step + mid), clamped; step = value_step(b) * sqrt(<y, y> / D)
    scale = <y, y> / <y, c - mid>, rounded to a byte
    decoded = Q^T ((c - mid) * scale).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from svdq import _C
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.reference.pages import join_codes, read_codes, used_rows, value_code_addresses


@functools.cache
def rotation(head_dim: int) -> Tensor:
    """The orthogonal matrix Q, [D, D] float64: a rotated row is ``x @ Q.T``."""
    block = head_dim & -head_dim
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        top, bottom = torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)
        hadamard = torch.cat([top, bottom])
    blocks = head_dim // block
    reflection = torch.eye(blocks, dtype=torch.float64) - 2 / blocks
    if blocks == 1:
        reflection = -reflection  # nothing is reflected
    signs = torch.tensor([_C.format.rotation_sign(d) for d in range(head_dim)]).double()
    return torch.kron(reflection, hadamard / block**0.5) * signs


def scale_bytes(scale: Tensor) -> Tensor:
    """Scales that are not negative, rounded to half and then to bytes, uint8."""
    half = scale.clamp_max(torch.finfo(torch.half).max).half().view(torch.int16).int()
    shift = _C.format.SCALE_SHIFT
    byte = (half + (1 << (shift - 1)) - 1 + (half >> shift & 1)) >> shift
    return byte.clamp_max(_C.format.LARGEST_SCALE).to(torch.uint8)


def scales_of(byte: Tensor) -> Tensor:
    """Scales that bytes stand for, float64."""
    return (byte.to(torch.int16) << _C.format.SCALE_SHIFT).view(torch.half).double()


def quantize_values(values: Tensor, v_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Code values of one width.

    Parameters
    ----------
    values : [..., T, D] float32, bfloat16 or float16.

    Returns
    -------
    scale : [..., T] float64, before it is rounded to a byte.
    codes : [..., T, D] float64, rounded and clamped.
    steps : [..., T, D] float64, codes before rounding.
    """
    rotated = values.double() @ rotation(values.shape[-1]).T
    square = rotated.square().sum(-1)
    step = _C.format.value_step(v_bits) * (square / values.shape[-1]).sqrt()
    top = 2**v_bits - 1
    ratio = torch.where(step[..., None] > 0, rotated / step[..., None], 0.0)
    steps = (ratio + top / 2).clamp(0, top)
    codes = steps.round()
    product = (rotated * (codes - top / 2)).sum(-1)
    return torch.where(product > 0, square / product, 0.0), codes, steps


def _planes(v_bits: int) -> list[tuple[int, int]]:
    """Width and shift of the planes of a code's bits."""
    return [(2, 0), (1, 2)] if v_bits == 3 else [(v_bits, 0)]


def _read_head(pages: Tensor, layout: PageLayout, head: int) -> tuple[Tensor, Tensor]:
    """Scale bytes [P, 64] and codes [P, 64, D] of the value pages of one head."""
    codes, first = 0, PAGE_TOKENS
    for width, shift in _planes(layout.v_bits[head]):
        size = layout.head_dim * PAGE_TOKENS * width // 8
        addresses = value_code_addresses(width, layout.head_dim)
        codes = codes | read_codes(pages[:, first : first + size], addresses, width) << shift
        first += size
    return pages[:, :PAGE_TOKENS], codes


def _write_head(scale: Tensor, codes: Tensor, layout: PageLayout, head: int) -> Tensor:
    """The value pages of one head: the inverse of :func:`_read_head`."""
    parts = [scale]
    for width, shift in _planes(layout.v_bits[head]):
        plane = codes >> shift & (1 << width) - 1
        parts.append(join_codes(plane, value_code_addresses(width, layout.head_dim)))
    return torch.cat(parts, dim=1)


def _head_spans(layout: PageLayout) -> list[slice]:
    """Where each head's part of a page of packed values lies."""
    sizes = [PAGE_TOKENS + layout.head_dim * PAGE_TOKENS * bits // 8 for bits in layout.v_bits]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def value_parts(
    v_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> list[Tensor]:
    """Stored parts of these slots.

    Returns
    -------
    Scale bytes [H, T] uint8 and codes [H, T, D] uint8; or exact values [H, T, D].
    """
    rows, slots = used_rows(page_table, slot, num_tokens)
    if not layout.packs_values:
        pages = v_pages[rows].unflatten(1, (layout.num_kv_heads, PAGE_TOKENS, -1))
        return [pages.transpose(0, 1).flatten(1, 2)[:, slots]]
    heads = [
        _read_head(v_pages[rows][:, span], layout, h) for h, span in enumerate(_head_spans(layout))
    ]
    scales, codes = zip(*heads, strict=True)
    return [torch.stack([x.flatten(0, 1)[slots] for x in part]) for part in (scales, codes)]


def write_value_parts_(
    v_pages: Tensor, parts: list[Tensor], layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Store parts of values: the inverse of :func:`value_parts`."""
    rows, slots = used_rows(page_table, slot, parts[0].shape[1])
    if not layout.packs_values:
        pages = v_pages[rows].unflatten(1, (layout.num_kv_heads, PAGE_TOKENS, -1))
        tokens = pages.transpose(0, 1).flatten(1, 2)
        tokens[:, slots] = parts[0].to(tokens.dtype)
        v_pages[rows] = tokens.unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1).flatten(1)
        return
    for h, span in enumerate(_head_spans(layout)):
        scale, codes = _read_head(v_pages[rows][:, span], layout, h)
        scale.reshape(-1)[slots] = parts[0][h].to(scale.dtype)
        scale, codes = scale.flatten(), codes.flatten(0, 1)
        scale[slots] = parts[0][h].to(scale.dtype)
        codes[slots] = parts[1][h].to(codes.dtype)
        pages = scale.unflatten(0, (-1, PAGE_TOKENS)), codes.unflatten(0, (-1, PAGE_TOKENS))
        v_pages[rows, span] = _write_head(*pages, layout, h)


def pack_values_(
    v_pages: Tensor, values: Tensor, layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Quantize or copy values; see :func:`svdq.ops.pack_values_`."""
    parts = [values]
    if layout.packs_values:
        coded = [quantize_values(x, bits) for x, bits in zip(values, layout.v_bits, strict=True)]
        scales = torch.stack([scale_bytes(scale) for scale, _, _ in coded])
        parts = [scales, torch.stack([codes for _, codes, _ in coded])]
    write_value_parts_(v_pages, parts, layout, page_table, slot)


def decode_values(scale: Tensor, codes: Tensor, layout: PageLayout) -> Tensor:
    """Values [H, T, D] float64 of scale bytes [H, T] and codes [H, T, D]."""
    mid = (2.0 ** torch.tensor(layout.v_bits) - 1)[:, None, None].double() / 2
    return (codes.double() - mid) * scales_of(scale)[..., None] @ rotation(layout.head_dim)


def unpack_values(
    v_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Decode values; see :func:`svdq.ops.unpack_values`."""
    parts = value_parts(v_pages, layout, page_table, slot, num_tokens)
    if not layout.packs_values:
        return parts[0].float()
    return decode_values(*parts, layout).float()
