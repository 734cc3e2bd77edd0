"""Drift of a sequence's keys away from those that its basis was fitted on."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.ops.tensors import normal_tensors

MEMORY = 0.75  # share of the mean error before a page that stays after it


class Drift:
    """Errors of packed keys: of those of the fit, and of the latest.

    Attributes
    ----------
    fit_error, error : [B, H] float32, mean squared error of a key when the basis was fitted, and of
        the latest pages. NaN without a basis.
    known : whether ``fit_error`` of each sequence is known.
    expected : whether that is an error that a calibration saw and the sequence has none yet.
    """

    NAMES = ("fit_error", "error")

    @normal_tensors
    def __init__(self, batch_size: int, heads: int, device: torch.device) -> None:
        shape = (batch_size, heads)
        self.fit_error = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.error = self.fit_error.clone()
        self.known = [False] * batch_size
        self.expected = [False] * batch_size

    def expect(self, b: int, error: Tensor) -> None:
        """Compare sequence b with the errors [H] that a calibration saw."""
        self.fit_error[b] = error
        self.known[b] = self.expected[b] = True

    def note(self, b: int, error: Tensor) -> None:
        """Take the mean squared errors [H] of keys that sequence b has packed."""
        if self.expected[b]:
            self.error[b] = error
            self.expected[b] = False
        elif self.known[b]:
            self.error[b] = MEMORY * self.error[b] + (1 - MEMORY) * error
        else:
            self.fit_error[b] = self.error[b] = error
            self.known[b] = True

    def ratio(self) -> Tensor:
        """Latest error over that of the fit, mean over heads, [B]."""
        tiny = torch.finfo(torch.float32).tiny
        return (self.error / self.fit_error.clamp(min=tiny)).mean(dim=1)

    def forget(self, b: int) -> None:
        """Forget sequence b, which has lost its basis."""
        self.known[b] = self.expected[b] = False
        self.fit_error[b] = self.error[b] = torch.nan

    def copy_sequence(self, b: int, source: Drift) -> None:
        """Go on with sequence b of another store."""
        for name in self.NAMES:
            getattr(self, name)[b] = getattr(source, name)[b]
        self.known[b], self.expected[b] = source.known[b], source.expected[b]

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        for name in self.NAMES:
            setattr(self, name, getattr(self, name)[indices])
        self.known = [self.known[i] for i in indices]
        self.expected = [self.expected[i] for i in indices]
