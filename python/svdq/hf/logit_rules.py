"""Softcap, learned sinks and sliding window, as models pass them to their attention function."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from svdq.ops import LogitRules

SOFTCAP_RANGE = (1e-30, 1e30)  # as svdq::attend takes them

_known_finite: dict[int, tuple[weakref.ref, int | None]] = {}


def logit_rules(query: Tensor, kwargs: dict[str, Any]) -> LogitRules:
    """The rules that ``softcap``, ``s_aux`` and ``sliding_window`` ask for.

    Parameters
    ----------
    query : [B, Hq, L, D].
    kwargs : of a model's attention function; what is missing, None or 0 asks for nothing.

    Raises
    ------
    ValueError
        For a softcap or a window that is out of range, or ``s_aux`` that is not one number of the
        query's device per query head.
    """
    softcap, window_size = (kwargs.get(name) or 0 for name in ("softcap", "sliding_window"))
    least, most = SOFTCAP_RANGE
    if softcap and not least <= softcap <= most:
        raise ValueError(f"softcap must be {least} to {most}, or None, got {softcap}")
    if window_size < 0:
        raise ValueError(f"sliding_window must be positive or None, got {window_size}")
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        if sinks.shape != query.shape[1:2] or sinks.device != query.device:
            raise ValueError(
                f"s_aux must be [{query.shape[1]}], one number a query head, on {query.device}, "
                f"got {tuple(sinks.shape)} on {sinks.device}"
            )
        sinks = sinks.float().contiguous()
    return LogitRules(float(softcap), sinks, int(window_size))


def check_finite(sinks: Tensor) -> None:
    """Fails for learned sinks that are not finite.

    Reading a GPU's numbers waits for the device, so a tensor there is looked at once, until it is
    updated.
    """
    version = None if sinks.is_inference() else sinks._version
    key = id(sinks)
    if sinks.device.type != "cpu":
        known = _known_finite.get(key)
        if known is not None and known[0]() is sinks and known[1] == version:
            return
    if not bool(torch.isfinite(sinks).all()):
        raise ValueError("s_aux must be finite, got NaN or inf")
    _known_finite[key] = weakref.ref(sinks, lambda _: _known_finite.pop(key, None)), version
