"""Bases, widths, scales and codes of keys, by the formulas alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from svdq import _C
from svdq.fit.pre_channels import DROPPED_VARIANCE
from svdq.layout import WIDTHS, PageLayout
from svdq.ops import KeyCodec
from svdq.reference.pages import QUAD

SAMPLE_TOKENS = 4096  # tokens that the search for a clipped range looks at
LARGEST_GAIN, UNBIASED_WIDTH = 2.0, 4  # of decoded latents, see kernels/params.h


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor | None, inverse: bool = False) -> Tensor:
    """Rotate (or unrotate) pairs ``(i, i + rotary_dim / 2)`` of x [..., T, D] by positions [T]."""
    x = x.double()
    if inv_freq is None:
        return x
    rotary_pairs = inv_freq.numel()
    angle = positions.double()[:, None] * inv_freq.double() * (-1 if inverse else 1)
    cos, sin = angle.cos(), angle.sin()
    x1, x2, rest = x.tensor_split((rotary_pairs, 2 * rotary_pairs), dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def _unrotated(keys: Tensor, inv_freq: Tensor | None, position: int) -> Tensor:
    return rotate(keys, position + torch.arange(keys.shape[-2]), inv_freq, inverse=True)


def _rotated(rows: Tensor, inv_freq: Tensor | None, position: int | Tensor) -> Tensor:
    if isinstance(position, int):
        position = position + torch.arange(rows.shape[-2])
    return rotate(rows, position, inv_freq)


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


def pre_components(keys: Tensor, layout: PageLayout, inv_freq: Tensor, position: int = 0) -> Tensor:
    """Components [H, D, D] without the pairs that each head's pre-RoPE channels drop; see
    svdq/fit/pre_channels.py."""
    mean, components, variance = fit_basis(keys.double(), inv_freq, position)
    centred = _unrotated(keys, inv_freq, position) - mean[:, None]
    rotary_pairs, found = inv_freq.numel(), torch.zeros_like(components)
    for h, bands in enumerate(layout.pre_bands):
        rank = sum(bands)
        held = variance[h, :rank] @ components[h, :rank].square()
        pairs = held[:rotary_pairs] + held[rotary_pairs : 2 * rotary_pairs]
        left = DROPPED_VARIANCE * held.sum()
        kept = torch.ones(layout.head_dim, dtype=torch.bool)
        for pair in pairs.argsort().tolist():
            if inv_freq[pair] > _C.ABSORBED_FASTEST and left >= pairs[pair]:
                left -= pairs[pair]
                kept[[pair, pair + rotary_pairs]] = False
        own = centred[h][:, kept]
        found[h, : kept.sum(), kept] = torch.linalg.eigh(own.mT @ own).eigenvectors.mT.flip(0)
        found[h, kept.sum() :, ~kept] = torch.eye(int((~kept).sum()), dtype=found.dtype)
    return _stored(found, keys)


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
    parts = [bands for head in layout.head_bands for bands in head]
    bits = [w for bands in parts for w, n in zip(WIDTHS, bands, strict=True) for _ in range(n)]
    return torch.tensor(bits, dtype=torch.int64)


def part_slices(layout: PageLayout) -> tuple[list[slice], list[slice]]:
    """Every head's pre-RoPE channels and post-RoPE channels among the rows of the basis."""
    counts = [sum(bands) for head in layout.head_bands for bands in head]
    slices = [slice(end - n, end) for end, n in zip(accumulate(counts), counts, strict=True)]
    return slices[::2], slices[1::2]


def head_slices(layout: PageLayout) -> list[slice]:
    """Every head's channels among the rows of the basis."""
    return [slice(pre.start, post.stop) for pre, post in zip(*part_slices(layout), strict=True)]


def latents(rows: Tensor, basis: Tensor, mean: Tensor, layout: PageLayout) -> Tensor:
    """Project un-rotated ``rows`` [H, T, D] on every head's channels: [T, R] float64."""
    return torch.cat(project(rows, basis, mean, head_slices(layout)), dim=1)


def project(rows: Tensor, basis: Tensor, mean: Tensor, slices: list[slice]) -> list[Tensor]:
    """Project ``rows`` [H, T, D] on the channels ``slices[h]`` of every head: [T, r] float64."""
    centred = rows.double() - mean.double()[:, None]
    return [centred[h] @ basis[at].double().T for h, at in enumerate(slices)]


def decode(codes: Tensor, basis: Tensor, scale: Tensor, widths: Tensor, slices: list[slice]):
    """Decode the codes [T, R] of the channels ``slices[h]``: [H, T, D] float64."""
    latent = (codes.double() - (2.0**widths - 1) / 2) * scale.double()
    return torch.stack([latent[:, at] @ basis[at].double() for at in slices])


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
    *,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> KeyCodec:
    """Basis vectors, scales and the centring mean; see :func:`svdq.ops.fit_quantizer`."""
    widths = channel_widths(layout)
    basis = torch.cat([components[h, : sum(n)] for h, n in enumerate(layout.bands)]).bfloat16()
    latent = latents(_unrotated(keys, inv_freq, position), basis, mean, layout)
    every = -(-latent.shape[0] // SAMPLE_TOKENS) if clip else 1
    multiples = [k / 10 for k in range(4, 81)] if clip else []
    scale, centre = _best_range(latent[::every], widths, multiples)
    if clip:  # scale and row times the root of the gain that makes decoded latents unbiased
        x = latent[::every] - centre
        decoded = (quantize(x, scale, widths) - (2.0**widths - 1) / 2) * scale
        product = (x * decoded).sum(0)
        coarse = (product > 0) & (widths <= UNBIASED_WIDTH)
        gain = torch.where(coarse, x.square().sum(0) / product, 1.0)
        root = gain.clamp(1 / LARGEST_GAIN, LARGEST_GAIN).sqrt()
        rows = torch.cat([components[h, : sum(n)] for h, n in enumerate(layout.bands)])
        basis, scale = (rows.double() * root[:, None]).bfloat16(), scale * root
        centre = centre / root
    shifts = [centre[at] @ basis[at].double() for at in head_slices(layout)]
    centred_mean = _stored(mean.double() + torch.stack(shifts), mean)
    return KeyCodec(basis, _stored(scale, mean), centred_mean, inv_freq=inv_freq)


def code_keys(keys: Tensor, codec: KeyCodec, layout: PageLayout, position: int = 0) -> Tensor:
    """Codes [T, R] of rotated keys [H, T, D]."""
    pre, post = part_slices(layout)
    latent = torch.zeros(keys.shape[1], layout.rank, dtype=torch.float64)
    widths = channel_widths(layout)

    def fill(rows: Tensor, mean: Tensor, slices: list[slice]) -> Tensor:
        for at, part in zip(slices, project(rows, codec.basis, mean, slices), strict=True):
            latent[:, at] = part
        return quantize(latent, codec.scale, widths)

    if layout.rope == "post":
        return fill(keys, codec.mean, post)
    codes = fill(_unrotated(keys, codec.inv_freq, position), codec.mean, pre)
    if layout.rope == "pre":
        return codes
    return fill(keys.double() - _decoded_pre(codes, codec, layout, position), codec.post_mean, post)


def _decoded_pre(
    codes: Tensor, codec: KeyCodec, layout: PageLayout, position: int | Tensor
) -> Tensor:
    """The rotated keys [H, T, D] that pre-RoPE channels and their mean stand for."""
    pre, _ = part_slices(layout)
    rows = decode(codes, codec.basis, codec.scale, channel_widths(layout), pre)
    return _rotated(rows + codec.mean.double()[:, None], codec.inv_freq, position)


def decode_keys(
    codes: Tensor, codec: KeyCodec, layout: PageLayout, position: int | Tensor = 0
) -> Tensor:
    """Rotated keys [H, T, D] that codes [T, R] stand for; ``position`` of the first, or of each."""
    _, post = part_slices(layout)
    decoded_post = decode(codes, codec.basis, codec.scale, channel_widths(layout), post)
    if layout.rope == "post":
        return _stored(decoded_post + codec.mean.double()[:, None], codec.mean)
    keys = _decoded_pre(codes, codec, layout, position)
    if layout.rope == "hybrid":
        keys = keys + decoded_post + codec.post_mean.double()[:, None]
    return _stored(keys, codec.mean)


def residual_keys(
    keys: Tensor, codec: KeyCodec, layout: PageLayout, *, position: int = 0
) -> Tensor:
    """Keys less their decoded pre-RoPE channels; see :func:`svdq.ops.residual_keys`."""
    own = replace(codec, post_mean=torch.zeros_like(codec.mean))
    codes = code_keys(keys, own, layout, position)
    return (keys.double() - _decoded_pre(codes, own, layout, position)).to(keys.dtype)


def fit_keys(
    keys: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> KeyCodec:
    """The codec of keys for any layout; see :func:`svdq.fit.bases.fit_keys`."""
    mean, components, _ = fit_basis(keys, inv_freq, position)
    options = {"inv_freq": inv_freq, "position": position, "clip": clip}
    if layout.rope != "hybrid":
        return fit_quantizer(keys, mean, components, layout, **options)
    basis = torch.zeros(layout.rank, layout.head_dim, dtype=torch.bfloat16)
    codec = KeyCodec(basis, mean.new_zeros(layout.rank), mean, torch.zeros_like(mean), inv_freq)

    def place(fitted: KeyCodec, part: PageLayout, slices: list[slice]) -> Tensor:
        for at, own in zip(slices, head_slices(part), strict=True):
            codec.basis[at], codec.scale[at] = fitted.basis[own], fitted.scale[own]
        return fitted.mean

    pre_slices, post_slices = part_slices(layout)
    pre, post = layout.pre_part, layout.post_part
    if pre is not None:
        components = pre_components(keys, layout, inv_freq, position)
        fitted = fit_quantizer(keys, mean, components, pre, **options)
        codec = replace(codec, mean=place(fitted, pre, pre_slices))
    residual = residual_keys(keys, codec, layout, position=position)
    post_mean, components, _ = fit_basis(residual)
    if post is not None:
        fitted = fit_quantizer(residual, post_mean, components, post, clip=clip)
        post_mean = place(fitted, post, post_slices)
    return replace(codec, post_mean=post_mean)
