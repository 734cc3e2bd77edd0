"""Gain of keys by the energy of queries, which puts keys in units of attention score.

An error e of a key moves a score by q . e. Averaged over queries, and over the rotations that RoPE
puts between a query and a key, channel d counts with the energy of the queries there, the same for
both channels of a RoPE pair. Keys that are multiplied by the root of that energy, and queries that
are divided by it, give the same scores, and their latent variances are variances of scores. Rounded
to powers of two the gain loses nothing in any float format, and it commutes with RoPE, so pages and
kernels know nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.ops.tensors import normal_tensors

MAX_EXPONENT = 4  # keeps keys times their gain within the range of a half
PIECE_TOKENS = 1024  # queries are squared this many at a time


class QueryEnergy:
    """Mean energy of the queries of every sequence and KV head, in squared units of score.

    Attributes
    ----------
    total : [B, H, D] float32, summed over query tokens, mean over the query heads of a KV head.
    count : [B] float32, query tokens.
    """

    @normal_tensors
    def __init__(self, batch: int, heads: int, dim: int, device: torch.device) -> None:
        self.total = torch.zeros((batch, heads, dim), dtype=torch.float32, device=device)
        self.count = torch.zeros(batch, dtype=torch.float32, device=device)

    def add(self, query: Tensor, sm_scale: float, padding: list[int]) -> None:
        """Add queries [B, Hq, L, D], rotated or not, without their left padding."""
        _, heads, dim = self.total.shape
        for b, pad in enumerate(padding):
            # Piece by piece, so that a long prompt's squares take little memory.
            for piece in query[b, :, pad:].split(PIECE_TOKENS, dim=1):
                squares = piece.float().square().sum(dim=1) * sm_scale**2
                self.total[b] += squares.view(heads, -1, dim).mean(dim=1)
            self.count[b] += query.shape[2] - pad

    def set(self, energy: Tensor, count: int) -> None:
        """Take a mean energy [H, D] of ``count`` tokens that was measured elsewhere."""
        self.total.copy_(energy.to(self.total.device) * count)
        self.count.fill_(count)

    def mean(self, b: int, rotary_pairs: int) -> Tensor:
        """Energy per channel of sequence b, [H, D], equal in both channels of every RoPE pair."""
        energy = self.total[b] / self.count[b].clamp(min=1)
        if rotary_pairs:
            pairs = (energy[:, :rotary_pairs] + energy[:, rotary_pairs : 2 * rotary_pairs]) / 2
            energy = torch.cat([pairs, pairs, energy[:, 2 * rotary_pairs :]], dim=1)
        return energy

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        self.total, self.count = self.total[indices], self.count[indices]


def key_gain(energy: Tensor) -> Tensor:
    """Powers of two near the root of the energy [H, D] relative to its head's mean: [H, D]."""
    relative = energy / energy.mean(dim=1, keepdim=True).clamp(min=1e-30)
    exponent = (relative.clamp(min=1e-30).log2() / 2).round()
    return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp2()


def amplified(keys: Tensor, gain: Tensor | None) -> Tensor:
    """Keys [H, T, D] times a gain [H, 1, D]; the keys themselves without one."""
    return keys if gain is None else keys * gain


def score_spectrum(components: Tensor, variance: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """Components by falling variance of score.

    Parameters
    ----------
    components : [H, D, D], rows are the basis of keys times their gain.
    variance : [H, D] of the latent channels.
    energy : [H, D] of the queries of such keys: divided by the squares of the gain.

    Returns
    -------
    components : the rows in descending order of their score variance.
    spectrum : [H, D] these score variances.
    """
    spectrum = torch.einsum("hjd,hd->hj", components.square(), energy) * variance
    spectrum, order = spectrum.sort(dim=1, descending=True, stable=True)
    return components.gather(1, order[..., None].expand_as(components)).contiguous(), spectrum
