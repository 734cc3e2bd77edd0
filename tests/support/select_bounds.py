"""Bounds on a backend's errors in the masses of tokens, derived from its arithmetic.

The CPU backends multiply codes with integer weights of the folded query, a scale for each band and
query: 1 / 127 of the largest that a page's weight can be, whatever the page's angles. Rounding
moves a token's score by
``sum_j (code_j - mid_j) * delta_j`` with deltas spread evenly over half a step to either side, and
every token of a page alike by ``sum_j mid_j * delta_j``. The CUDA kernels' weights are finer. What
remains is float32: some rounding errors of sums over the head's channels, and an exponential within
1 % of the true one. Bounds take SIGMAS deviations.
"""

import torch
from torch import Tensor

from support import FLOAT_ERROR
from svdq import reference
from svdq.layout import PageLayout
from svdq.ops import KeyCodec

SIGMAS = 6
EXPONENTIAL_ERROR = 0.01


def log_mass_errors(
    query: Tensor,
    codes: Tensor,
    codec: KeyCodec,
    layout: PageLayout,
    sm_scale: float,
    *,
    channels: int,
) -> Tensor:
    """Bound [H, T] on the error of the logarithm of one sequence's masses; see token_masses."""
    basis, scale, mean, post_mean = codec.basis, codec.scale, codec.mean, codec.post_mean
    widths = reference.channel_widths(layout)
    half = 0 if codec.inv_freq is None else codec.inv_freq.numel()
    queries = query.double().unflatten(0, (layout.num_kv_heads, -1)).flatten(1, 2) * sm_scale
    bounds = []
    for h, parts in enumerate(reference.proxy_slices(layout, channels)):
        rows = queries[h]
        variance = torch.zeros(rows.shape[0], codes.shape[0], dtype=torch.float64)
        magnitude = mean[h].double().abs()
        if post_mean is not None:
            magnitude = magnitude + post_mean[h].double().abs()
        for is_post, part in enumerate(parts):
            for width in widths[part].unique():
                band = torch.arange(part.start, part.stop)[widths[part] == width]
                scaled = basis[band].double() * scale[band].double()[:, None]
                if not is_post and half:
                    largest = (rows[:, None] * scaled).abs()  # [rows, channels, D]
                    q = rows[:, None, :half].square() + rows[:, None, half : 2 * half].square()
                    b = scaled[:, :half].square() + scaled[:, half : 2 * half].square()
                    pairs = (q * b).sqrt()  # the largest of any rotation of a pair
                    largest = torch.cat([pairs, largest[..., 2 * half :]], dim=-1).sum(-1)
                else:
                    largest = (rows @ scaled.T).abs()
                step = largest.amax(-1) / 127
                mid = (2.0**width - 1) / 2
                moved = (codes[:, band].double() - mid).square().sum(-1) + len(band) * mid**2
                variance += step.square()[:, None] / 12 * moved
                magnitude = magnitude + 2 * mid * scaled.abs().sum(0)
        rounding = (4 * layout.head_dim + 40) ** 0.5 * FLOAT_ERROR
        error = SIGMAS * (variance.sqrt() + (rounding * (rows.abs() @ magnitude))[:, None])
        # The norm is off by no more than the worst score.
        worst = error.amax() if error.numel() else 0.0
        bounds.append(error.amax(0) + worst + EXPONENTIAL_ERROR)
    return torch.stack(bounds)
