"""Time to the first token, and bits of a prompt right after it: calibrated bases against fitted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from svdq import Calibration, SVDqCache
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.memory import bf16_bytes
from svdq_bench.quality.models import check_length
from svdq_bench.quality.perplexity import prefill
from svdq_bench.speed.generate import FULL


@torch.inference_mode()
def bench_first_token(
    model: PreTrainedModel,
    token_ids: Tensor,
    calibration: Calibration,
    lengths: Sequence[int],
    repeats: int = 3,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Time prompts of several lengths, with all caches in turns.

    Parameters
    ----------
    model : a causal language model with its default attention.
    token_ids : [T] int64; prompts are its first tokens.
    calibration : caches without it have its settings, and fit each prompt.
    lengths : tokens of prompts.
    repeats : rounds of all caches; one more, before them, warms up.
    begin : called with the name of each of the ``3 * lengths * (repeats + 1)`` steps.

    Returns
    -------
    Rows: case, tokens, ttft_ms (the prompt's forward pass, fitting and packing included; median),
    ttft_vs_full, and of caches that pack the bits of a number of keys and values, all in. What all
    prompts share is not a prompt's.
    """
    if len(token_ids) < max(lengths):
        raise ValueError(f"the text has {len(token_ids)} tokens, {max(lengths)} are asked for")
    check_length(model, max(lengths))
    makers = {
        FULL: lambda: DynamicCache(config=model.config),
        "svdq, a basis for each prompt": lambda: SVDqCache(model.config, **calibration.settings),
        "svdq, calibrated": lambda: SVDqCache(model.config, calibration=calibration),
    }
    rows = []
    for length in lengths:
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        caches = {}
        for repeat in range(repeats + 1):
            for name in makers if repeat % 2 == 0 else reversed(makers):
                begin(f"{length:,} tokens, {name}")
                caches[name] = makers[name]()
                with attention(model, None if name == FULL else "svdq"):
                    start = time.perf_counter()
                    prefill(model, token_ids[None, :length], caches[name]).argmax(-1)
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
        for name, cache in caches.items():
            row = {
                "benchmark": "first_token",
                "case": name,
                "tokens": length,
                "ttft_ms": medians[name] * 1e3,
                "ttft_vs_full": medians[name] / medians[FULL],
            }
            if isinstance(cache, SVDqCache):
                report, (full, held) = cache.memory_report(), bf16_bytes(cache)
                row |= {"key_bits": report.key_bits, "value_bits": report.value_bits}
                row |= {"times_smaller_bf16": full / held}
                row |= {"calibration_bytes": report.calibration}
            rows.append(row)
    return rows
