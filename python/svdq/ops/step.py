"""The decode step of a layer: pack, append and attend, with all lengths on the device."""

from __future__ import annotations

from torch import Tensor

from svdq.ops.nouns import NO_RULES, LogitRules, PackedKeys, Window
from svdq.ops.registered import call


def decode_step_(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: PackedKeys,
    window: Window,
    sm_scale: float,
    *,
    residual_length: int,
    faults: Tensor,
    gain: Tensor | None = None,
    rules: LogitRules = NO_RULES,
) -> Tensor:
    """Pack what has left the window, append new tokens to it, and attend to everything.

    A sequence packs the rest of its page, its oldest tokens after the sinks, once
    ``residual_length`` tokens stand behind them; the rows that follow move down. The new rows of
    sequence b come behind the others. Queries are the last L tokens, as in
    :func:`svdq.ops.attend`. What the step itself makes due is packed by the next one.
    ``k_pages``, ``v_pages``, ``cache_seqlens``, the window's ``keys``, ``values`` and ``lens`` and
    ``faults`` change in place.

    Parameters
    ----------
    query : [B, Hq, L, D] float32, bfloat16 or float16, rotated; Hq a multiple of H, L 1 to 64.
    keys, values : [B, H, L, D] in the query's dtype, which is that of the window.
    packed : packed tokens, with values and without outliers. Every sequence has a codec. Where a
        sequence is due, column ``cache_seqlens[b] // 64`` of ``page_table`` names the page to fill.
    window : contiguous [B, H, E, D]; its first ``packed.sink_tokens`` rows are sinks and stay.
    sm_scale : softmax scale, usually ``D ** -0.5``.
    residual_length : recent tokens that are not packed.
    faults : [B] int32, contiguous, 0 for sequences that go on. Not read on a CPU.
    gain : [B, H, D] float32, bfloat16 or float16; keys are stored times their gain, queries divided
        by it.
    rules : softcap, learned sinks and sliding window.

    Returns
    -------
    out : [B, Hq, L, D] in the query's dtype.

    Raises
    ------
    ValueError
        For arguments that do not fit each other and, on a CPU, for keys or values that are not
        finite (values that are packed: above 65504 in magnitude), and where the window or the page
        table of a sequence is full. Nothing is written then. On a CUDA device ``faults`` is set
        instead, that sequence keeps the tokens that it had, of which those that were due may be
        packed by then, and its output is NaN.
    """
    return call(
        "decode_step_",
        packed,
        window,
        rules,
        query=query,
        keys=keys,
        values=values,
        sm_scale=sm_scale,
        gain=gain,
        residual_length=residual_length,
        faults=faults,
    )
