"""Which codes pack_keys_ may write, derived from its arithmetic."""

import torch

from support import FLOAT_ERROR, assert_within
from svdq import reference


def code_steps(keys, fitted, layout, inv_freq, position):
    """Latents in steps, as exact code numbers [T, R], and a bound on an operator's errors in them.

    With u = FLOAT_ERROR, per latent in the operator's float32:
    - turning a key back: cosine and sine of a sum of two angles (4 u), two products and a sum
      (3 u), all relative to the length of the pair;
    - taking the mean off: u of the result;
    - D products summed in any order: at most (D + 1) u times the sum of their magnitudes;
    - times 1 / scale plus the middle: 3 roundings of a number below twice the top code.
    """
    basis, scale, mean = fitted
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
        turned = 7 * reference.latents(pairs, *magnitudes)
    else:
        turned = torch.zeros_like(products)
    error = FLOAT_ERROR * (turned + (keys.shape[2] + 2) * products) / scale
    top = 2.0**widths - 1
    return latent / scale + top / 2, error + 3 * FLOAT_ERROR * 2 * top


def hybrid_code_steps(codes, keys, fitted, layout, inv_freq, position):
    """The same for a hybrid layout.

    Its core is coded like a layout of its own. The tail gets what the core's codes, as they are,
    leave: keys less a decoded core that is a sum in double, rounded before and after it is turned,
    or a chain of a multiply-add a channel on a GPU; so every number of it is off by no more than
    (r + 8) u times the sum of the terms' lengths, which a turn leaves alone.
    """
    basis, scale, mean, post_mean = fitted
    steps, error = torch.zeros(2, *codes.shape, dtype=torch.float64)
    core, tail = (
        torch.cat([torch.arange(*at.indices(layout.rank)) for at in part])
        for part in reference.part_slices(layout)
    )
    if layout.core is not None:
        part = (basis[core], scale[core], mean)
        steps[:, core], error[:, core] = code_steps(keys, part, layout.core, inv_freq, position)
    if layout.tail is not None:
        coded = torch.zeros_like(codes)
        coded[:, core] = codes[:, core]
        core_alone = (
            basis,
            torch.zeros_like(scale).index_copy(0, core, scale[core]),
            mean.double(),
        )
        options = (inv_freq, position, torch.zeros_like(mean))
        residual = keys - reference.decode_keys(coded, *core_alone, layout, *options)
        part = (basis[tail], scale[tail], post_mean)
        steps[:, tail], error[:, tail] = code_steps(residual, part, layout.tail, None, 0)
        for h, (core_at, tail_at) in enumerate(zip(*reference.part_slices(layout), strict=True)):
            top = 2.0 ** reference.channel_widths(layout)[core_at] - 1
            lengths = basis[core_at].double().norm(dim=1)
            reach = mean[h].double().norm() + (scale[core_at].double() * top) @ lengths
            off = (len(top) + 8) * FLOAT_ERROR * (reach + keys[h].double().norm(dim=1))
            rows = basis[tail_at].double().norm(dim=1)
            error[:, tail_at] += off[:, None] * rows / scale[tail_at]
    return steps, error


def check_codes(codes, keys, fitted, layout, inv_freq=None, position=0):
    """Every code is the rounded latent; where its bound spans a boundary, either neighbour."""
    if layout.rope == "hybrid":
        steps, error = hybrid_code_steps(codes, keys, fitted, layout, inv_freq, position)
    else:
        steps, error = code_steps(keys, fitted, layout, inv_freq, position)
    top = 2.0 ** reference.channel_widths(layout) - 1
    low = (steps - error).round().clamp(min=torch.zeros_like(top), max=top)
    high = (steps + error).round().clamp(min=torch.zeros_like(top), max=top)
    assert_within(codes, (low + high) / 2, (high - low) / 2)
    # The bound leaves next to no choice, or the test would say nothing.
    assert (low != high).double().mean() < 0.02
