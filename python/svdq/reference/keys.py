"""Bases, widths, scales and codes of keys, by the formulas alone."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from svdq import _C
from svdq.fit.pre_channels import SPARED_VARIANCE
from svdq.layout import WIDTHS, PageLayout
from svdq.reference.pages import QUAD, band_counts

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


def core_components(
    keys: Tensor, layout: PageLayout, inv_freq: Tensor, position: int = 0
) -> Tensor:
    """Components [H, D, D] without the pairs that each head's core spares; see svdq/core.py."""
    mean, components, variance = fit_basis(keys.double(), inv_freq, position)
    centred = _unrotated(keys, inv_freq, position) - mean[:, None]
    half, found = inv_freq.numel(), torch.zeros_like(components)
    for h, bands in enumerate(layout.pre_bands):
        rank = sum(bands)
        held = variance[h, :rank] @ components[h, :rank].square()
        pairs, left = held[:half] + held[half : 2 * half], SPARED_VARIANCE * held.sum()
        kept = torch.ones(layout.head_dim, dtype=torch.bool)
        for pair in pairs.argsort().tolist():
            if inv_freq[pair] > _C.ABSORBED_FASTEST and left >= pairs[pair]:
                left -= pairs[pair]
                kept[[pair, pair + half]] = False
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
    counts = band_counts(layout)
    bits = [w for bands in counts for w, n in zip(WIDTHS, bands, strict=True) for _ in range(n)]
    return torch.tensor(bits, dtype=torch.int64)


def part_slices(layout: PageLayout) -> tuple[list[slice], list[slice]]:
    """Every head's core channels and tail channels among the rows of the basis."""
    counts = [sum(bands) for bands in band_counts(layout)]
    slices = [slice(end - n, end) for end, n in zip(accumulate(counts), counts, strict=True)]
    return slices[::2], slices[1::2]


def head_slices(layout: PageLayout) -> list[slice]:
    """Every head's channels among the rows of the basis."""
    return [slice(core.start, tail.stop) for core, tail in zip(*part_slices(layout), strict=True)]


def latents(rows: Tensor, basis: Tensor, mean: Tensor, layout: PageLayout) -> Tensor:
    """Project un-rotated ``rows`` [H, T, D] on every head's channels: [T, R] float64."""
    return torch.cat(project(rows, basis, mean, head_slices(layout)), dim=1)


def project(rows: Tensor, basis: Tensor, mean: Tensor, slices: list[slice]) -> list[Tensor]:
    """Project ``rows`` [H, T, D] on the channels ``slices[h]`` of every head: [T, r] float64."""
    centred = rows.double() - mean.double()[:, None]
    return [centred[h] @ basis[at].double().T for h, at in enumerate(slices)]


def decode(codes: Tensor, basis: Tensor, scale: Tensor, widths: Tensor, slices: list[slice]):
    """What the codes [T, R] of the channels ``slices[h]`` stand for: [H, T, D] float64."""
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


def code_keys(
    keys: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    post_mean: Tensor | None = None,
) -> Tensor:
    """Codes [T, R] of rotated keys [H, T, D]."""
    core, tail = part_slices(layout)
    latent = torch.zeros(keys.shape[1], layout.rank, dtype=torch.float64)
    widths = channel_widths(layout)

    def fill(rows: Tensor, mean: Tensor, slices: list[slice]) -> Tensor:
        for at, part in zip(slices, project(rows, basis, mean, slices), strict=True):
            latent[:, at] = part
        return quantize(latent, scale, widths)

    if layout.rope == "post":
        return fill(keys, mean, tail)
    codes = fill(_unrotated(keys, inv_freq, position), mean, core)
    if layout.rope == "pre":
        return codes
    rows = decode(codes, basis, scale, widths, core) + mean.double()[:, None]
    residual = keys.double() - _rotated(rows, inv_freq, position)
    return fill(residual, post_mean, tail)


def decode_keys(
    codes: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int | Tensor = 0,
    post_mean: Tensor | None = None,
) -> Tensor:
    """Rotated keys [H, T, D] that codes [T, R] stand for; ``position`` of the first, or of each."""
    slices, widths = part_slices(layout), channel_widths(layout)
    core, tail = (decode(codes, basis, scale, widths, at) for at in slices)
    if layout.rope == "post":
        return _stored(tail + mean.double()[:, None], mean)
    keys = _rotated(core + mean.double()[:, None], inv_freq, position)
    if layout.rope == "hybrid":
        keys = keys + tail + post_mean.double()[:, None]
    return _stored(keys, mean)


def residual_keys(
    keys: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
) -> Tensor:
    """Keys less their decoded core; see :func:`svdq.ops.residual_keys`."""
    widths, (core, _) = channel_widths(layout), part_slices(layout)
    codes = code_keys(keys, basis, scale, mean, layout, inv_freq, position, torch.zeros_like(mean))
    rows = decode(codes, basis, scale, widths, core) + mean.double()[:, None]
    return (keys.double() - _rotated(rows, inv_freq, position)).to(keys.dtype)


def fit_keys(
    keys: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Basis, scale, mean and tail mean of any layout; see :func:`svdq.fitting.fit_keys`."""
    mean, components, _ = fit_basis(keys, inv_freq, position)
    if layout.rope != "hybrid":
        return *fit_quantizer(keys, mean, components, layout, inv_freq, position, clip), None
    basis = torch.zeros(layout.rank, layout.head_dim, dtype=torch.bfloat16)
    scale = mean.new_zeros(layout.rank)

    def place(fitted: tuple[Tensor, ...], part: PageLayout, slices: list[slice]) -> Tensor:
        for at, own in zip(slices, head_slices(part), strict=True):
            basis[at], scale[at] = fitted[0][own], fitted[1][own]
        return fitted[2]

    core_slices, tail_slices = part_slices(layout)
    if layout.core is not None:
        components = core_components(keys, layout, inv_freq, position)
        fitted = fit_quantizer(keys, mean, components, layout.core, inv_freq, position, clip)
        mean = place(fitted, layout.core, core_slices)
    residual = residual_keys(keys, basis, scale, mean, layout, inv_freq, position)
    post_mean, components, _ = fit_basis(residual)
    if layout.tail is not None:
        fitted = fit_quantizer(residual, post_mean, components, layout.tail, clip=clip)
        post_mean = place(fitted, layout.tail, tail_slices)
    return basis, scale, mean, post_mean
