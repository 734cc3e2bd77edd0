"""Decode steps of one layer in a row: those that pack a page of every sequence, and the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from svdq.config.settings import Settings
from svdq.layout import PAGE_TOKENS
from svdq.store.layer_store import LayerStore
from svdq_bench.speed.shape import Shape, synthetic_keys

WARMUP_STEPS = 8
CYCLES = 3  # of 64 steps, each of which packs once


def bench_steps(
    shape: Shape,
    settings: Settings,
    dtype: torch.dtype = torch.bfloat16,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Time steps that append a token to every sequence and attend.

    All sequences have one length, so that all of them fill a page in the same step, the worst case.

    Parameters
    ----------
    shape : heads, sequences, and tokens of each before the first step.
    settings : of the cache; widths must not be allocated.
    dtype : of queries, keys and values.
    begin : called with the name of each of the two steps as it begins.

    Returns
    -------
    One row: ordinary_ms and boundary_ms (medians of steps that pack nothing and that pack pages),
    boundary_ratio (of the two).
    """
    batch, heads, dim = shape.batch, shape.num_kv_heads, shape.head_dim
    begin("packing")
    frequencies = None if settings.rope == "post" else lambda _: shape.inv_freq
    size, device = (batch, heads, dim), torch.device("cpu")
    store = LayerStore(settings, size, dtype, device, frequencies=frequencies)
    keys = torch.stack([synthetic_keys(shape, b).to(dtype) for b in range(batch)])
    with torch.inference_mode():
        store.prefill(keys, torch.randn_like(keys), None)
        del keys
        begin("steps")
        ordinary, boundary = [], []
        for step in range(WARMUP_STEPS + CYCLES * PAGE_TOKENS):
            query = torch.randn(batch, shape.num_qo_heads, 1, dim).to(dtype)
            new_keys, new_values = torch.randn(2, batch, heads, 1, dim).to(dtype)
            slots = store.packed_slots(0)
            start = time.perf_counter()
            store.attend(query, new_keys, new_values, dim**-0.5)
            elapsed = time.perf_counter() - start
            if step >= WARMUP_STEPS:
                (ordinary if store.packed_slots(0) == slots else boundary).append(elapsed)
    usual, packs = (1e3 * statistics.median(times) for times in (ordinary, boundary))
    return [
        {
            "benchmark": "steps",
            "case": f"{settings.rope}, {batch} sequences",
            "ordinary_ms": usual,
            "boundary_ms": packs,
            "boundary_ratio": packs / usual,
            "dtype": str(dtype).removeprefix("torch."),
            **shape.__dict__,
        }
    ]
