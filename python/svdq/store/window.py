"""The window: uncompressed keys and values of every sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq import ops
from svdq.ops import Window
from svdq.ops.tensors import int32_tensor, normal_tensors

GRANULE = 16  # tokens are allocated in multiples of this


class WindowStore:
    """Attention sinks, recent tokens, and all tokens of a sequence that is not packed yet.

    Attributes
    ----------
    keys, values : [B, H, E, D] in the model's dtype; rotated keys times their gain.
    count : tokens in use per sequence.
    lens : [B] int32, ``count`` as of the last :meth:`set_count`.
    """

    @normal_tensors
    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        batch, heads, dim = shape
        self.keys = torch.empty((batch, heads, 0, dim), dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.set_count([0] * batch)

    @property
    def capacity(self) -> int:
        """Tokens allocated per sequence, E."""
        return self.keys.shape[2]

    @property
    def window(self) -> Window:
        """All sequences, as operators take them."""
        return Window(self.keys, self.values, self.lens)

    @property
    def empty_window(self) -> Window:
        """A window of the same batch without tokens."""
        return Window(self.keys[:, :, :0], self.values[:, :, :0], torch.zeros_like(self.lens))

    def set_count(self, count: list[int]) -> None:
        """Set how many tokens of each sequence are in use."""
        self.count = count
        self.lens = int32_tensor(count, self.keys.device)

    def reserve(self, tokens: int) -> None:
        """Make room for this many tokens; grows by at least a quarter, so appending is cheap."""
        if tokens > self.capacity:
            self.resize(max(tokens, self.capacity * 5 // 4))

    @normal_tensors
    def resize(self, tokens: int) -> None:
        """Reallocate to this many tokens, rounded up, keeping those in use."""
        size = -(-tokens // GRANULE) * GRANULE
        used = max(self.count)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], size, old.shape[3]))
            new[:, :, :used] = old[:, :, :used]
            setattr(self, name, new)

    def write(self, b: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Write [H, T, D] keys and values, checked to be finite, from token ``start`` on."""
        if keys.shape[1]:
            ops.append_window_(self.keys[b], self.values[b], keys, values, start)

    def remove(self, b: int, start: int, stop: int) -> None:
        """Remove tokens ``start .. stop - 1`` of sequence b, moving later ones down."""
        end = self.count[b]
        for tokens in (self.keys[b], self.values[b]):
            moved = tokens[:, stop:end]
            overlaps = end - stop > stop - start
            tokens[:, start : start + end - stop] = moved.clone() if overlaps else moved
        self.count[b] -= stop - start

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        chosen = torch.tensor(indices, dtype=torch.long)
        self.keys, self.values = self.keys[chosen], self.values[chosen]
        self.set_count([self.count[i] for i in indices])
