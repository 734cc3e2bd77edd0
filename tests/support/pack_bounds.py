"""Hybrid layouts to pack, and the codes that pack_keys_ may write, derived from its arithmetic."""

from dataclasses import replace

import torch

from support import FLOAT_ERROR, assert_within, make_layout
from svdq import reference
from svdq.layout import PageLayout
from svdq.ops import KeyCodec

HYBRID_LAYOUTS = {
    "mixed": make_layout(64, [4, 2, 1, 0], 2, "hybrid"),
    "rotated-mean": make_layout(64, [4, 2, 1, 0], 2, "hybrid", pre_bands=((0, 0, 0, 0),) * 2),
    "pre-alone": PageLayout(64, ((0,) * 4,) * 2, "hybrid", pre_bands=((4, 8, 4, 8),) * 2),
    "all-channels-twice": make_layout(64, [2, 1], 2, "hybrid", pre_bands=((0, 0, 32, 32),) * 2),
    "heads-of-different-size": PageLayout(
        80,
        ((8, 0, 4, 8), (0, 0, 0, 0), (0, 12, 0, 0), (0, 0, 0, 0)),
        "hybrid",
        pre_bands=((0, 4, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (4, 0, 0, 8)),
    ),
}


def code_steps(keys, codec, layout, position):
    """Latents in units of the scale, as exact code numbers [T, R], and a bound on an operator's
    errors in them.

    With u = FLOAT_ERROR, per latent in the operator's float32:
    - unrotating a key: cosine and sine of a sum of two angles (4 u), two products and a sum
      (3 u), all relative to the length of the pair;
    - taking the mean off: u of the result;
    - D products summed in any order: at most (D + 1) u times the sum of their magnitudes;
    - times 1 / scale plus the middle: 3 roundings of a number below twice the top code.
    """
    basis, scale, mean, inv_freq = codec.basis, codec.scale, codec.mean, codec.inv_freq
    positions = position + torch.arange(keys.shape[1])
    rows = reference.rotate(keys, positions, inv_freq, inverse=True)
    widths = reference.channel_widths(layout)
    latent = reference.latents(rows, basis, mean, layout)
    magnitudes = basis.abs(), torch.zeros_like(mean), layout
    products = reference.latents((rows - mean[:, None]).abs(), *magnitudes)
    if inv_freq is not None:
        half = inv_freq.numel()
        pairs = keys.double().clone()
        pairs[..., :half] = torch.hypot(pairs[..., :half], pairs[..., half : 2 * half])
        pairs[..., half : 2 * half] = pairs[..., :half]
        rotated = 7 * reference.latents(pairs, *magnitudes)
    else:
        rotated = torch.zeros_like(products)
    error = FLOAT_ERROR * (rotated + (keys.shape[2] + 2) * products) / scale
    top = 2.0**widths - 1
    return latent / scale + top / 2, error + 3 * FLOAT_ERROR * 2 * top


def hybrid_code_steps(codes, keys, codec, layout, position):
    """The same for a hybrid layout.

    Its pre-RoPE channels are coded like a layout of their own. The post-RoPE channels get what the
    codes of those, as they are, leave: keys less a decoded part that is a sum in double, rounded
    before and after it is rotated, or a chain of a multiply-add a channel on a GPU; so every number
    of it is off by no more than (r + 8) u times the sum of the terms' lengths, which a rotation
    does not change.
    """
    steps, error = torch.zeros(2, *codes.shape, dtype=torch.float64)
    pre, post = (
        torch.cat([torch.arange(*at.indices(layout.rank)) for at in part])
        for part in reference.part_slices(layout)
    )
    basis, scale, mean = codec.basis, codec.scale, codec.mean
    if layout.pre_part is not None:
        part = KeyCodec(basis[pre], scale[pre], mean, inv_freq=codec.inv_freq)
        steps[:, pre], error[:, pre] = code_steps(keys, part, layout.pre_part, position)
    if layout.post_part is not None:
        coded = torch.zeros_like(codes)
        coded[:, pre] = codes[:, pre]
        pre_alone = replace(
            codec,
            scale=torch.zeros_like(scale).index_copy(0, pre, scale[pre]),
            mean=mean.double(),
            post_mean=torch.zeros_like(mean),
        )
        residual = keys - reference.decode_keys(coded, pre_alone, layout, position)
        part = KeyCodec(basis[post], scale[post], codec.post_mean)
        steps[:, post], error[:, post] = code_steps(residual, part, layout.post_part, 0)
        for h, (pre_at, post_at) in enumerate(zip(*reference.part_slices(layout), strict=True)):
            top = 2.0 ** reference.channel_widths(layout)[pre_at] - 1
            lengths = basis[pre_at].double().norm(dim=1)
            reach = mean[h].double().norm() + (scale[pre_at].double() * top) @ lengths
            off = (len(top) + 8) * FLOAT_ERROR * (reach + keys[h].double().norm(dim=1))
            rows = basis[post_at].double().norm(dim=1)
            error[:, post_at] += off[:, None] * rows / scale[post_at]
    return steps, error


def check_codes(codes, keys, codec, layout, position=0):
    """Every code is the rounded latent; where its bound spans a boundary, either neighbour."""
    if layout.rope == "hybrid":
        steps, error = hybrid_code_steps(codes, keys, codec, layout, position)
    else:
        steps, error = code_steps(keys, codec, layout, position)
    top = 2.0 ** reference.channel_widths(layout) - 1
    low = (steps - error).round().clamp(min=torch.zeros_like(top), max=top)
    high = (steps + error).round().clamp(min=torch.zeros_like(top), max=top)
    assert_within(codes, (low + high) / 2, (high - low) / 2)
    # The bound leaves next to no choice, or the test would say nothing.
    assert (low != high).double().mean() < 0.02
