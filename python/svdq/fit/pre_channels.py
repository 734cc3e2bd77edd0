"""The pre-RoPE channels of a hybrid layout, and the RoPE pairs that they drop.

On a CPU, attention absorbs the slow RoPE pairs of pre-RoPE channels into the query, page by page.
In fast pairs, of a frequency above ``_C.ABSORBED_FASTEST``, it reconstructs the keys of each head
whose pre-RoPE channels have anything there, which is most of what these channels cost. They hold
little in most of the fast pairs. So every head leaves the fast pairs that matter least to it to its
post-RoPE channels, and its pre-RoPE basis is zero there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq import _C
from svdq.layout import PageLayout

# Share of what a head's pre-RoPE channels hold that may be dropped from them: of the variance of
# its keys, and of the variance of its scores, where the energy of the queries is known.
DROPPED_VARIANCE = 0.05
DROPPED_SCORES = 0.005


@dataclass(frozen=True)
class PreChannels:
    """The channels that keys are coded with before RoPE.

    Parameters
    ----------
    layout : a hybrid layout, of whose post-RoPE channels nothing is read.
    fast : [rotary_pairs] bool, RoPE pairs that cannot be absorbed at the frequencies of these keys.
    """

    layout: PageLayout
    fast: Tensor

    @classmethod
    def of(cls, layout: PageLayout, inv_freq: Tensor | None) -> PreChannels | None:
        """Those of a layout for keys with these frequencies; None unless it is a hybrid one."""
        if layout.rope != "hybrid":
            return None
        if inv_freq is None:
            raise ValueError("inv_freq is needed for a hybrid layout, got None")
        return cls(layout, inv_freq > _C.ABSORBED_FASTEST)

    def drop(
        self, components: Tensor, variance: Tensor, energy: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Components of the same covariance without the pairs that matter least to each head.

        Parameters
        ----------
        components, variance : of :func:`svdq.ops.fit_basis`.
        energy : [H, D] of the queries, if it says what matters.

        Returns
        -------
        The same two. A head's first components are zero in all channels of its dropped pairs; as
        many as these are come last, hold them alone, and have variance 0.
        """
        ranks = torch.tensor([sum(head) for head in self.layout.pre_bands])
        dropped = dropped_pairs(components, variance, ranks.to(variance.device), self.fast, energy)
        if not dropped.any():
            return components, variance
        return without_pairs(components, variance, dropped)


def dropped_pairs(
    components: Tensor,
    variance: Tensor,
    ranks: Tensor,
    fast: Tensor,
    energy: Tensor | None = None,
) -> Tensor:
    """Fast pairs that matter least to what each head's first components hold.

    Parameters
    ----------
    components, variance, energy : as for :meth:`PreChannels.drop`.
    ranks : [H] components of a head that count, those of largest variance (of score).
    fast : [rotary_pairs] bool, pairs that may be dropped.

    Returns
    -------
    [H, rotary_pairs] bool: the pairs that hold least, together at most ``DROPPED_VARIANCE`` or
    ``DROPPED_SCORES``.
    """
    rotary_pairs = len(fast)
    parts = variance[..., None] * components.square()
    if energy is not None:
        parts = parts * energy[:, None]
    order = parts.sum(dim=2).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    held = (parts * (order < ranks[:, None])[..., None]).sum(dim=1)
    pairs = held[:, :rotary_pairs] + held[:, rotary_pairs : 2 * rotary_pairs]
    ascending, order = pairs.masked_fill(~fast, torch.inf).sort(dim=1)
    share = DROPPED_VARIANCE if energy is None else DROPPED_SCORES
    dropped = ascending.cumsum(dim=1) <= share * held.sum(dim=1, keepdim=True)
    return torch.zeros_like(dropped).scatter(1, order, dropped)


def without_pairs(components: Tensor, variance: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Components of the same covariance without some pairs, [H, rotary_pairs] bool; see
    :meth:`PreChannels.drop`."""
    dim, rotary_pairs = components.shape[2], dropped.shape[1]
    rest = dropped.new_zeros(len(dropped), dim - 2 * rotary_pairs)
    left = torch.cat([dropped, dropped, rest], dim=1)
    covariance = components.mT @ (variance[..., None] * components)
    covariance.masked_fill_(left[:, None] | left[..., None], 0)
    # Below all other variances, so that they come last and mix with none.
    lowest = -variance.amax(dim=1, keepdim=True).clamp_min(torch.finfo(variance.dtype).tiny)
    covariance.diagonal(dim1=1, dim2=2).add_(left * lowest)
    # In float64, as fit_basis does: float32 solvers fail over variances of very different size.
    ascending, vectors = (x.to(variance.dtype) for x in torch.linalg.eigh(covariance.double()))
    # Set to zero whatever differs from zero by rounding alone.
    last = torch.arange(dim, device=left.device) >= (~left).sum(dim=1, keepdim=True)
    components = vectors.mT.flip(1).masked_fill(left[:, None] != last[..., None], 0)
    largest = components.gather(2, components.abs().argmax(dim=2, keepdim=True))
    components = torch.where(largest < 0, -components, components)  # as fit_basis has them
    return components.contiguous(), ascending.flip(1).clamp_min(0)
