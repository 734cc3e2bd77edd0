"""How far a backend's weights of tokens may be from the reference, derived from its arithmetic.

The CPU backends multiply codes with integer weights, a step for each band and query: 1 / 127 of the
most that a page's weight can be, whatever the page's angles. Rounding moves a token's score by
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

SIGMAS = 6
EXPONENTIAL_ERROR = 0.01


def lead_slices(layout: PageLayout, channels: int) -> list[tuple[slice, slice]]:
    """Every head's leading core and tail channels among the rows of the basis."""
    result = []
    for core, tail in zip(*reference.part_slices(layout), strict=True):
        core_end = min(core.stop, core.start + channels)
        left = channels - (core_end - core.start)
        result.append(
            (slice(core.start, core_end), slice(tail.start, min(tail.stop, tail.start + left)))
        )
    return result


def log_weight_errors(
    query: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    sm_scale: float,
    inv_freq: Tensor | None,
    post_mean: Tensor | None,
    channels: int,
) -> Tensor:
    """Bound [H, T] on the error of the logarithm of one sequence's weights; see select_weights."""
    widths = reference.channel_widths(layout)
    half = 0 if inv_freq is None else inv_freq.numel()
    queries = query.double().unflatten(0, (layout.num_kv_heads, -1)).flatten(1, 2) * sm_scale
    bounds = []
    for h, parts in enumerate(lead_slices(layout, channels)):
        rows = queries[h]
        variance = torch.zeros(rows.shape[0], codes.shape[0], dtype=torch.float64)
        magnitude = mean[h].double().abs()
        if post_mean is not None:
            magnitude = magnitude + post_mean[h].double().abs()
        for is_tail, part in enumerate(parts):
            for width in widths[part].unique():
                band = torch.arange(part.start, part.stop)[widths[part] == width]
                scaled = basis[band].double() * scale[band].double()[:, None]
                if not is_tail and half:
                    most = (rows[:, None] * scaled).abs()  # [rows, channels, D]
                    q = rows[:, None, :half].square() + rows[:, None, half : 2 * half].square()
                    b = scaled[:, :half].square() + scaled[:, half : 2 * half].square()
                    pairs = (q * b).sqrt()  # the most that any turn makes of a pair
                    most = torch.cat([pairs, most[..., 2 * half :]], dim=-1).sum(-1)
                else:
                    most = (rows @ scaled.T).abs()
                step = most.amax(-1) / 127
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
