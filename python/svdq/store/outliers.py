"""Outliers: packed tokens whose keys are held exact as well, because their codes misjudge them."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.fit.key_gain import amplified
from svdq.layout import NO_SLOT
from svdq.ops.tensors import normal_tensors

GRANULE = 8  # outliers are allocated in multiples of this


class Outliers:
    """Outliers of every sequence and head of one store.

    At the prefill every head's tokens of largest error are chosen; a token that is packed later is
    an outlier if its error is at least that of the last one chosen.

    Attributes
    ----------
    slots : [B, H, N] int32, ascending, then ``NO_SLOT``.
    keys : [B, H, N, D] bfloat16, or float16 where the model is: rotated keys times their gain.
    min_error : [B, H] float32, smallest error that makes an outlier; infinite before the first
        choice.
    """

    NAMES = ("slots", "keys", "min_error")

    @normal_tensors
    def __init__(
        self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        held = torch.float16 if dtype == torch.float16 else torch.bfloat16
        self.slots = torch.empty((batch, heads, 0), dtype=torch.int32, device=device)
        self.keys = torch.empty((batch, heads, 0, dim), dtype=held, device=device)
        shape = (batch, heads)
        self.min_error = torch.full(shape, torch.inf, dtype=torch.float32, device=device)

    def choose(
        self,
        b: int,
        keys: Tensor,
        errors: Tensor,
        slot: int,
        *,
        fraction: float | None,
        skip: int = 0,
        gain: Tensor | None = None,
    ) -> None:
        """Choose among keys [H, T, D] that were packed from slot ``slot`` on.

        Parameters
        ----------
        errors : [H, T] float32, squared errors of their codes.
        fraction : share of the tokens to choose in every head; None for those that are as bad as
            the ones chosen before.
        skip : leading tokens that are not chosen: sinks.
        gain : [H, 1, D] that the keys have yet to be multiplied by, or None.
        """
        errors = errors.clone()
        errors[:, :skip] = -torch.inf
        if fraction is None:
            chosen = errors >= self.min_error[b][:, None]
        else:
            count = round(fraction * errors.shape[1])
            if count == 0:
                return
            top = errors.topk(count, dim=1)
            self.min_error[b] = top.values[:, -1]
            chosen = torch.zeros_like(errors, dtype=torch.bool).scatter_(1, top.indices, True)
        counts = chosen.sum(dim=1)
        if not int(counts.max()):
            return
        used = (self.slots[b] < NO_SLOT).sum(dim=1)
        self._reserve(int((used + counts).max()))
        for h in range(len(counts)):
            tokens = chosen[h].nonzero()[:, 0]
            at = slice(int(used[h]), int(used[h]) + len(tokens))
            self.slots[b, h, at] = (tokens + slot).int()
            own = amplified(keys[h, tokens], None if gain is None else gain[h])
            self.keys[b, h, at] = own.to(self.keys.dtype)

    def truncate(self, b: int, slots: int) -> None:
        """Forget sequence b's outliers from slot ``slots`` on, and without slots its bound."""
        self.slots[b][self.slots[b] >= slots] = NO_SLOT
        if slots == 0:
            self.min_error[b] = torch.inf

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        for name in self.NAMES:
            setattr(self, name, getattr(self, name)[indices])

    @normal_tensors
    def _reserve(self, count: int) -> None:
        have = self.slots.shape[2]
        if count <= have:
            return
        size = -(-count // GRANULE) * GRANULE
        slots = self.slots.new_full((*self.slots.shape[:2], size), NO_SLOT)
        keys = self.keys.new_zeros((*self.keys.shape[:2], size, self.keys.shape[3]))
        slots[:, :, :have], keys[:, :, :have] = self.slots, self.keys
        self.slots, self.keys = slots, keys
