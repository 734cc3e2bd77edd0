"""The core of a hybrid layout: its channels, and the RoPE pairs that they do without.

On a CPU, attention absorbs the slow RoPE pairs of core channels into the query, page by page. In
fast ones, of a frequency above ``_C.ABSORBED_FASTEST``, it reconstructs the keys of each head whose
core has anything there, which is most of what core channels cost. A core has little in most of
these pairs. So every head leaves those to the tail that matter least to it, and its basis is zero
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq import _C
from svdq.layout import PageLayout

# Share of what a head's core channels hold that may be left to the tail: of the variance of its
# keys, and of the variance of its scores, where the energy of the queries is known.
SPARED_VARIANCE = 0.05
SPARED_SCORES = 0.005


@dataclass(frozen=True)
class Core:
    """What keys are coded with before RoPE.

    Parameters
    ----------
    layout : a hybrid layout, of whose tail nothing is read.
    fast : [half] bool, RoPE pairs that cannot be absorbed, by the frequencies of the positions.
    """

    layout: PageLayout
    fast: Tensor

    @classmethod
    def of(cls, layout: PageLayout, inv_freq: Tensor | None) -> Core | None:
        """The core of a layout for keys with these frequencies; None unless it is a hybrid one."""
        if layout.rope != "hybrid":
            return None
        if inv_freq is None:
            raise ValueError("inv_freq is needed for a hybrid layout, got None")
        return cls(layout, inv_freq > _C.ABSORBED_FASTEST)

    def spare(
        self, components: Tensor, variance: Tensor, energy: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Components of the same covariance that do without what matters least to each head.

        Parameters
        ----------
        components, variance : of :func:`svdq.ops.fit_basis`.
        energy : [H, D] of the queries, if it says what matters.

        Returns
        -------
        The same two. A head's first components are zero in all channels of its spared pairs; as
        many as these are come last, have them alone, and variance 0.
        """
        ranks = torch.tensor([sum(head) for head in self.layout.pre_bands])
        spared = spared_pairs(components, variance, ranks.to(variance.device), self.fast, energy)
        if not spared.any():
            return components, variance
        return without_pairs(components, variance, spared)


def spared_pairs(
    components: Tensor,
    variance: Tensor,
    ranks: Tensor,
    fast: Tensor,
    energy: Tensor | None = None,
) -> Tensor:
    """Fast pairs that matter least to what each head's leading components hold.

    Parameters
    ----------
    components, variance, energy : as for :meth:`Core.spare`.
    ranks : [H] components of a head that count, those of largest variance (of score).
    fast : [half] bool, pairs that may be spared.

    Returns
    -------
    [H, half] bool: the least ones, together at most ``SPARED_VARIANCE`` or ``SPARED_SCORES``.
    """
    half = len(fast)
    parts = variance[..., None] * components.square()
    if energy is not None:
        parts = parts * energy[:, None]
    place = parts.sum(dim=2).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    held = (parts * (place < ranks[:, None])[..., None]).sum(dim=1)
    pairs = held[:, :half] + held[:, half : 2 * half]
    least, order = pairs.masked_fill(~fast, torch.inf).sort(dim=1)
    share = SPARED_VARIANCE if energy is None else SPARED_SCORES
    spared = least.cumsum(dim=1) <= share * held.sum(dim=1, keepdim=True)
    return torch.zeros_like(spared).scatter(1, order, spared)


def without_pairs(components: Tensor, variance: Tensor, spared: Tensor) -> tuple[Tensor, Tensor]:
    """Components of the same covariance without some pairs, [H, half] bool; see :class:`Core`."""
    dim, half = components.shape[2], spared.shape[1]
    rest = spared.new_zeros(len(spared), dim - 2 * half)
    left = torch.cat([spared, spared, rest], dim=1)
    covariance = components.mT @ (variance[..., None] * components)
    covariance.masked_fill_(left[:, None] | left[..., None], 0)
    # Below all other variances, so that they come last and mix with none.
    lowest = -variance.amax(dim=1, keepdim=True).clamp_min(torch.finfo(variance.dtype).tiny)
    covariance.diagonal(dim1=1, dim2=2).add_(left * lowest)
    ascending, vectors = torch.linalg.eigh(covariance)
    # What is zero but for rounding is zero.
    last = torch.arange(dim, device=left.device) >= (~left).sum(dim=1, keepdim=True)
    components = vectors.mT.flip(1).masked_fill(left[:, None] != last[..., None], 0)
    largest = components.gather(2, components.abs().argmax(dim=2, keepdim=True))
    components = torch.where(largest < 0, -components, components)  # as fit_basis has them
    return components.contiguous(), ascending.flip(1).clamp_min(0)
