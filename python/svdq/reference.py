"""The definition of every operator of :mod:`svdq.ops` in plain PyTorch, to test backends by.

Signatures, shapes and dtypes are those of :mod:`svdq.ops`. Arithmetic is float64 and follows the
formulas of SVDq (arXiv 2502.15304) and kernels/format.h alone. Given float64 queries, keys or
means, results stay float64 too. Arguments are taken as valid: only the operators check them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from svdq.layout import PAGE_TOKENS, WIDTHS, PageLayout

LANES, QUAD = 16, 4  # a line of codes is 16 lanes of 4 bytes
SAMPLE_TOKENS = 4096  # tokens that the search for a clipped range looks at


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor | None, inverse: bool = False) -> Tensor:
    """Turn (or turn back) pairs ``(i, i + rotary_dim / 2)`` of x [..., T, D] to positions [T]."""
    x = x.double()
    if inv_freq is None:
        return x
    half = inv_freq.numel()
    angle = positions.double()[:, None] * inv_freq.double() * (-1 if inverse else 1)
    cos, sin = angle.cos(), angle.sin()
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def _unrotated(keys: Tensor, inv_freq: Tensor | None, position: int) -> Tensor:
    return rotate(keys, position + torch.arange(keys.shape[-2]), inv_freq, inverse=True)


def _stored(x: Tensor, like: Tensor) -> Tensor:
    """``x`` as float32, or as float64 if the input ``like`` was."""
    return x.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


# Bases and widths.


def fit_basis(
    keys: Tensor, inv_freq: Tensor | None = None, position: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and eigenvectors of every head's covariance; see :func:`svdq.ops.fit_basis`."""
    rows = _unrotated(keys, inv_freq, position)
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    variance, vectors = torch.linalg.eigh(centred.mT @ centred / rows.shape[1])
    components = vectors.mT.flip(1)
    largest = components.gather(2, components.abs().argmax(dim=2, keepdim=True))
    components = components * largest.sign()
    variance = variance.flip(1).clamp(min=0)
    return _stored(mean, keys), _stored(components, keys), _stored(variance, keys)


def allocate_bits(variance: Tensor, schedule: list[int]) -> Tensor:
    """Equal groups of channels, extended to whole lines; see :func:`svdq.ops.allocate_bits`."""
    heads, dim = variance.shape
    counts, assigned = [], 0
    for width in WIDTHS:
        groups = sum(bits >= width for bits in schedule)  # groups with this width or a larger one
        end = -(-groups * dim // len(schedule))
        unit = QUAD * max(1, 2 // width)  # channels that end on a line: 8 at one bit, else 4
        count = -(-max(end - assigned, 0) // unit) * unit
        counts.append(min(count, (dim - assigned) // unit * unit))
        assigned += counts[-1]
    return torch.tensor([counts] * heads, dtype=torch.int32)


def channel_widths(layout: PageLayout) -> Tensor:
    """Bits of every coded channel, [R], in the order of the basis."""
    bits = [w for head in layout.bands for w, n in zip(WIDTHS, head, strict=True) for _ in range(n)]
    return torch.tensor(bits, dtype=torch.int64)


def head_slices(layout: PageLayout) -> list[slice]:
    """Every head's channels among the rows of the basis."""
    ends = list(accumulate(sum(head) for head in layout.bands))
    return [slice(end - sum(head), end) for end, head in zip(ends, layout.bands, strict=True)]


def latents(rows: Tensor, basis: Tensor, mean: Tensor, layout: PageLayout) -> Tensor:
    """Project un-rotated ``rows`` [H, T, D] on every head's channels: [T, R] float64."""
    centred = rows.double() - mean.double()[:, None]
    parts = [centred[h] @ basis[at].double().T for h, at in enumerate(head_slices(layout))]
    return torch.cat(parts, dim=1)


def quantize(latent: Tensor, scale: Tensor, widths: Tensor) -> Tensor:
    """Codes of ``latent`` [T, R], whose zero is the middle of the range."""
    top = 2.0**widths - 1
    steps = torch.where(scale > 0, latent / scale.double(), 0.0)
    return (steps + top / 2).round().clamp(min=torch.zeros_like(top), max=top)


def _best_range(latent: Tensor, widths: Tensor, multiples: list[float]) -> tuple[Tensor, Tensor]:
    """Scale and centre of least fourth power of the error: min-max or multiples of deviation."""
    top = 2.0**widths - 1
    low, high, deviation = latent.amin(0), latent.amax(0), latent.std(0, correction=0)
    ranges = [((high - low) / top, (high + low) / 2)]
    ranges += [(2 * multiple * deviation / top, latent.mean(0)) for multiple in multiples]
    errors = []
    for scale, centre in ranges:
        decoded = (quantize(latent - centre, scale, widths) - top / 2) * scale + centre
        errors.append((decoded - latent).pow(4).sum(0))
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    return tuple(torch.stack(x).gather(0, best)[0] for x in zip(*ranges, strict=True))


def fit_quantizer(
    keys: Tensor,
    mean: Tensor,
    components: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Basis rows, scales and the centring mean; see :func:`svdq.ops.fit_quantizer`."""
    widths = channel_widths(layout)
    basis = torch.cat([components[h, : sum(n)] for h, n in enumerate(layout.bands)]).bfloat16()
    latent = latents(_unrotated(keys, inv_freq, position), basis, mean, layout)
    every = -(-latent.shape[0] // SAMPLE_TOKENS) if clip else 1
    multiples = [k / 10 for k in range(4, 81)] if clip else []
    scale, centre = _best_range(latent[::every], widths, multiples)
    shifts = [centre[at] @ basis[at].double() for at in head_slices(layout)]
    return basis, _stored(scale, mean), _stored(mean.double() + torch.stack(shifts), mean)


# Codes in pages. A unit is 64 codes of one width, 4 in each of 16 lanes; a line, 8 / width units.


def _places(unit: Tensor, lane: Tensor, element: Tensor, width: int) -> tuple[Tensor, Tensor]:
    per_line = 8 // width
    byte = unit // per_line * LANES * QUAD + lane * QUAD + element
    return byte, (unit % per_line * width).expand_as(byte)


def key_places(width: int, num_channels: int) -> tuple[Tensor, Tensor]:
    """Byte and shift of the codes of one band, [64, num_channels] by slot and channel."""
    token, channel = torch.arange(PAGE_TOKENS)[:, None], torch.arange(num_channels)
    unit = channel // QUAD * (PAGE_TOKENS // LANES) + token // LANES
    return _places(unit, token % LANES, channel % QUAD, width)


def value_places(width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Byte and shift of the codes of one head's values, [64, head_dim] by slot and channel."""
    token, channel = torch.arange(PAGE_TOKENS)[:, None], torch.arange(head_dim)
    unit = channel // LANES * (PAGE_TOKENS // QUAD) + token // QUAD
    return _places(unit, channel % LANES, token % QUAD, width)


def read_codes(pages: Tensor, places: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Codes [..., 64, n] of the bytes [..., size] of a band."""
    byte, shift = places
    return (pages.long()[..., byte] >> shift) & (2**width - 1)


def join_codes(codes: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Inverse of :func:`read_codes`: every byte is the sum of its shifted codes."""
    byte, shift = (x.flatten() for x in places)
    shifted = codes.flatten(-2) << shift
    pages = shifted.new_zeros(*shifted.shape[:-1], int(byte.max()) + 1)
    return pages.index_add_(-1, byte, shifted).byte()


def _bands(layout: PageLayout) -> Iterator[tuple]:
    """Of every band of every head: columns of the codes, bytes of a page, places and width."""
    channel, byte = 0, 0
    for count, width in (
        (n, w) for head in layout.bands for n, w in zip(head, WIDTHS, strict=True)
    ):
        size = count * width * PAGE_TOKENS // 8
        if count:
            span = slice(channel, channel + count), slice(byte, byte + size)
            yield *span, key_places(width, count), width
        channel, byte = channel + count, byte + size


def _rows(page_table: Tensor, slot: int, num_tokens: int) -> tuple[Tensor, slice]:
    """Rows of the pool that these slots touch, and where the slots lie in them laid end to end."""
    first = slot // PAGE_TOKENS
    rows = page_table[first : -(-(slot + num_tokens) // PAGE_TOKENS)].long()
    return rows, slice(slot - first * PAGE_TOKENS, slot - first * PAGE_TOKENS + num_tokens)


def pack_keys_(
    k_pages: Tensor,
    keys: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    inv_freq: Tensor | None = None,
    position: int = 0,
) -> None:
    """Project, quantize and store keys; see :func:`svdq.ops.pack_keys_`."""
    latent = latents(_unrotated(keys, inv_freq, position), basis, mean, layout)
    codes = quantize(latent, scale, channel_widths(layout)).long()
    write_codes_(k_pages, codes, layout, page_table, slot)


def write_codes_(
    k_pages: Tensor, codes: Tensor, layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Store codes [T, R]: the inverse of :func:`unpack_codes`; other slots keep theirs."""
    rows, slots = _rows(page_table, slot, codes.shape[0])
    for columns, span, places, width in _bands(layout):
        band = read_codes(k_pages[rows, span], places, width).flatten(0, 1)
        band[slots] = codes[:, columns].long()
        k_pages[rows, span] = join_codes(band.unflatten(0, (-1, PAGE_TOKENS)), places)


def unpack_codes(
    k_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Read codes; see :func:`svdq.ops.unpack_codes`."""
    rows, slots = _rows(page_table, slot, num_tokens)
    codes = torch.empty(num_tokens, layout.rank, dtype=torch.uint8)
    for columns, span, places, width in _bands(layout):
        codes[:, columns] = read_codes(k_pages[rows, span], places, width).flatten(0, 1)[slots]
    return codes


def unpack_keys(
    k_pages: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    num_tokens: int,
    inv_freq: Tensor | None = None,
    position: int = 0,
) -> Tensor:
    """Decode keys and rotate them to their positions; see :func:`svdq.ops.unpack_keys`."""
    codes = unpack_codes(k_pages, layout, page_table, slot, num_tokens).double()
    latent = (codes - (2.0 ** channel_widths(layout) - 1) / 2) * scale.double()
    rows = [latent[:, at] @ basis[at].double() for at in head_slices(layout)]
    keys = torch.stack(rows) + mean.double()[:, None]
    return _stored(rotate(keys, position + torch.arange(num_tokens), inv_freq), mean)


# Values: per token and group of channels, v = zero + code * scale.


def _by_slot(pages: Tensor) -> Tensor:
    """[pages, H, 64, n] -> [H, slots, n]."""
    return pages.transpose(0, 1).flatten(1, 2)


def _by_page(slots: Tensor) -> Tensor:
    """[H, slots, n] -> [pages, H, 64, n]."""
    return slots.unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1)


def _value_parts(v_pages: Tensor, rows: Tensor, layout: PageLayout) -> list[Tensor]:
    """Scales and zero points [H, slots, groups] half and codes [H, slots, D], or exact values."""
    pages = v_pages[rows].unflatten(1, (layout.num_kv_heads, -1))
    if layout.v_bits > 8:
        return [_by_slot(pages.unflatten(2, (PAGE_TOKENS, -1)))]
    size = layout.head_dim // layout.v_group_size * PAGE_TOKENS * 2
    *halves, codes = pages.split([size, size, pages.shape[2] - 2 * size], dim=2)
    halves = [x.contiguous().view(torch.half).unflatten(2, (-1, PAGE_TOKENS)).mT for x in halves]
    places = value_places(layout.v_bits, layout.head_dim)
    return [_by_slot(x) for x in (*halves, read_codes(codes, places, layout.v_bits))]


def value_parts(
    v_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> list[Tensor]:
    """What is stored of these slots: scales, zero points and codes, or exact values."""
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
    rows, slots = _rows(page_table, slot, values.shape[1])
    parts = _value_parts(v_pages, rows, layout)
    if layout.v_bits > 8:
        parts[0][:, slots] = values
        v_pages[rows] = _by_page(parts[0]).flatten(1)
        return
    scale, zero, codes = parts
    scale[:, slots], zero[:, slots], exact_codes = quantize_values(values, layout)
    codes[:, slots] = exact_codes.round().long()
    halves = [_by_page(x).mT.flatten(2).view(torch.uint8) for x in (scale, zero)]
    codes = join_codes(_by_page(codes), value_places(layout.v_bits, layout.head_dim))
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


def append_exact_(
    exact_keys: Tensor, exact_values: Tensor, keys: Tensor, values: Tensor, start: int
) -> None:
    """Copy new tokens into exact rows; see :func:`svdq.ops.append_exact_`."""
    exact_keys[:, start : start + keys.shape[1]] = keys
    exact_values[:, start : start + values.shape[1]] = values


# Attention.


def attend_keys(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` [Hq, L, D] over keys, values [H, n, D] where ``visible`` [L, n]."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = (query.double() @ keys.mT * sm_scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    # A query that sees nothing has lse = -inf; its differences are NaN, its probabilities zero.
    probabilities = (scores - lse[..., None]).exp().nan_to_num(nan=0.0)
    return probabilities @ values, lse


def visible_tokens(q_len: int, packed: int, exact: int, causal: bool) -> Tensor:
    """Which of the packed tokens and exact rows each query sees, [L, packed + exact]."""
    visible = torch.ones(q_len, packed + exact, dtype=torch.bool)
    if causal:  # query i is exact row exact - L + i and sees itself and what came before it
        visible[:, packed:] = visible[:, packed:].tril(exact - q_len)
    return visible


def attend(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    exact_keys: Tensor,
    exact_values: Tensor,
    exact_lens: Tensor,
    sm_scale: float,
    inv_freq: Tensor | None = None,
    first_position: Tensor | None = None,
    sink_tokens: int = 0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decode everything, then attend; see :func:`svdq.ops.attend`."""
    results = []
    for b in range(query.shape[0]):
        packed = max(int(cache_seqlens[b]) - sink_tokens, 0)
        at = (layout, page_table[b], sink_tokens, packed)
        position = sink_tokens + (int(first_position[b]) if first_position is not None else 0)
        k = unpack_keys(k_pages, basis[b], scale[b], mean[b].double(), *at, inv_freq, position)
        v = unpack_values(v_pages, *at)
        exact = int(exact_lens[b])
        k = torch.cat([k.double(), exact_keys[b, :, :exact].double()], dim=1)
        v = torch.cat([v.double(), exact_values[b, :, :exact].double()], dim=1)
        visible = visible_tokens(query.shape[2], packed, exact, causal)
        results.append(attend_keys(query[b], k, v, visible, sm_scale))
    out, lse = (torch.stack(x) for x in zip(*results, strict=True))
    return out.to(query.dtype), _stored(lse, query)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys; see :func:`svdq.ops.merge`."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    # Where both sets are empty the weights are exp(-inf - -inf): nothing, so zeros.
    weights = [(x.double() - lse).exp().nan_to_num(nan=0.0)[..., None] for x in (lse_a, lse_b)]
    out = weights[0] * out_a.double() + weights[1] * out_b.double()
    return out.to(out_a.dtype), _stored(lse, lse_a)
