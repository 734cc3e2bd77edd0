"""Positions of the tokens of a call, read once for all layers of a model."""

from __future__ import annotations

import weakref

from torch import Tensor

_latest: tuple[weakref.ref, int, list[list[int]]] | None = None


def read_positions(position_ids: Tensor, tokens_before: int) -> list[list[int]]:
    """``position_ids`` [B, L] as lists.

    All layers of a model get the same tensor in one step, and on a GPU reading it waits for the
    device, so the last answer is kept. ``tokens_before``, the tokens in the cache, tells the steps
    of a model apart that writes new positions into an old tensor.
    """
    global _latest
    if position_ids.device.type == "cpu":
        return position_ids.tolist()
    if _latest is None or _latest[0]() is not position_ids or _latest[1] != tokens_before:
        _latest = (weakref.ref(position_ids), tokens_before, position_ids.tolist())
    return _latest[2]
