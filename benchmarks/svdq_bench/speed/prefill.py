"""Cost of fitting and packing a prompt, compared with the model's own prefill of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from svdq import cache_argument, ops
from svdq.hf.rope import inverse_frequencies
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq_bench.quality.models import check_length

STAGES = ("fit_basis", "fit_quantizer", "pack_keys", "pack_values")


def bench_prefill(
    model: PreTrainedModel,
    token_ids: Tensor,
    schedule: Sequence[int],
    rope: str = "pre",
    v_bits: int = 4,
    clip: bool = True,
    repeats: int = 3,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Time the prefill of a prompt and, in the same run, fitting and packing its cache.

    Parameters
    ----------
    model : a causal language model with its default attention.
    token_ids : [T] int64, the prompt.
    schedule, rope, v_bits, clip : how to compress.
    repeats : prefills and compressions, taking turns; medians are reported.
    begin : called with the name of each of the ``2 * repeats`` steps as it begins.

    Returns
    -------
    Rows: case (the prefill, every stage, and the stages together), ms, fraction_of_prefill, tokens,
    layers (those that a cache would pack).
    """
    if rope not in ("pre", "post"):
        raise ValueError(f"bench prefill times rope pre and post, got {rope!r}")
    if len(token_ids) < 1:
        raise ValueError("expected at least one token to prefill")
    check_length(model, len(token_ids))
    config = model.config.get_text_config()
    prefill, stages = [], {name: [] for name in STAGES}
    with torch.inference_mode():
        for _ in range(repeats):
            begin("prefill")
            start = time.perf_counter()
            cache = DynamicCache(config=model.config)
            model(token_ids[None], logits_to_keep=1, **cache_argument(cache))
            prefill.append(time.perf_counter() - start)
            begin("fit and pack")
            seconds = dict.fromkeys(STAGES, 0.0)
            packed = [(i, x) for i, x in enumerate(cache.layers) if not x.is_sliding]
            for index, layer in packed:
                inv_freq = None
                if rope == "pre":
                    inv_freq = inverse_frequencies(config, index, len(token_ids) - 1)
                _compress(
                    layer.keys[0], layer.values[0], schedule, rope, v_bits, clip, inv_freq, seconds
                )
            for name in STAGES:
                stages[name].append(seconds[name])
    times = {"prefill": statistics.median(prefill)}
    times |= {name: statistics.median(values) for name, values in stages.items()}
    totals = [sum(values) for values in zip(*stages.values(), strict=True)]
    times["fit and pack together"] = statistics.median(totals)
    return [
        {
            "benchmark": "prefill",
            "case": case,
            "ms": seconds * 1e3,
            "fraction_of_prefill": seconds / times["prefill"],
            "tokens": len(token_ids),
            "layers": len(packed),
            "dtype": str(model.dtype).removeprefix("torch."),
            "rope": rope,
            "schedule": list(schedule),
            "v_bits": v_bits,
        }
        for case, seconds in times.items()
    ]


def _compress(
    keys: Tensor,
    values: Tensor,
    schedule: Sequence[int],
    rope: str,
    v_bits: int,
    clip: bool,
    inv_freq: Tensor | None,
    seconds: dict[str, float],
) -> None:
    """Fit and pack one layer's keys and values, [H, T, D], adding to the stages' times."""

    @contextmanager
    def stage(name):
        start = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - start

    heads, tokens, dim = keys.shape
    with stage("fit_basis"):
        mean, components, variance = ops.fit_basis(keys, inv_freq)
    with stage("fit_quantizer"):
        bands = tuple(map(tuple, ops.allocate_bits(variance, list(schedule)).tolist()))
        layout = PageLayout(dim, bands, rope, v_bits)
        codec = ops.fit_quantizer(keys, mean, components, layout, inv_freq=inv_freq, clip=clip)
    num_pages = -(-tokens // PAGE_TOKENS)
    page_table = torch.arange(num_pages, dtype=torch.int32)
    with stage("pack_keys"):
        k_pages = torch.empty(num_pages, layout.k_page_bytes, dtype=torch.uint8)
        ops.pack_keys_(k_pages, keys, codec, layout, page_table, 0)
    with stage("pack_values"):
        v_pages = torch.empty(num_pages, layout.v_page_bytes, dtype=torch.uint8)
        ops.pack_values_(v_pages, values, layout, page_table, 0)
