"""A model's prefill and decoding with svdq caches against transformers' own, in the same run.

Every cache is prefilled with the same prompt, then all take turns in blocks of decode steps, so
that a busy moment of the machine meets each of them. A step is one forward pass of one token, the
model's greedy choice, as ``generate`` makes it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from svdq import cache_argument
from svdq.cache.cache import SVDqCache
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.memory import full_cache_bytes
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.models import check_length
from svdq_bench.quality.perplexity import prefill

BLOCK_TOKENS = 8  # steps of one cache before the next one's turn; the first of them does not count
FULL = "DynamicCache"
# transformers' quantized cache needs one of these packages: its name, and the cache's backend.
QUANTIZED_BACKENDS = {"optimum.quanto": "quanto", "hqq": "HQQ"}
QUANTIZED_BITS = 4


@dataclass
class Contender:
    """One cache, what it did and how long that took.

    Parameters
    ----------
    name : of its rows.
    make : a new, empty cache.
    implementation : attention that reads it; None for the model's own.
    """

    name: str
    make: Callable[[], Cache]
    implementation: str | None = None
    settings: CacheSettings | None = None
    cache: Cache | None = None
    token: Tensor | None = None
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def quantized_backend() -> str | None:
    """Name of the backend that transformers' ``QuantizedCache`` can use here, if any."""
    for package, backend in QUANTIZED_BACKENDS.items():
        parts = package.split(".")
        if all(find_spec(".".join(parts[: n + 1])) for n in range(len(parts))):
            return backend
    return None


def contenders(model: PreTrainedModel, settings: Sequence[CacheSettings]) -> list[Contender]:
    """The full cache, transformers' quantized one where it can run, and svdq's."""
    config = model.config
    found = [Contender(FULL, lambda: DynamicCache(config=config))]
    backend = quantized_backend()
    if backend is not None:
        from transformers import QuantizedCache

        name = f"QuantizedCache {backend} {QUANTIZED_BITS}-bit"
        found.append(Contender(name, lambda: QuantizedCache(backend, config, QUANTIZED_BITS)))
    for each in settings:
        found.append(
            Contender(each.label, lambda s=each: s.make_cache(config), each.implementation, each)
        )
    return found


@torch.inference_mode()
def bench_generate(
    model: PreTrainedModel,
    token_ids: Tensor,
    settings: Sequence[CacheSettings],
    new_tokens: int = 64,
    repeats: int = 1,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Time prefilling a prompt and decoding after it, with every cache.

    Parameters
    ----------
    model : a causal language model with its default attention.
    token_ids : [T] int64, the prompt.
    settings : svdq caches.
    new_tokens : decode steps of every cache, at least two blocks of ``BLOCK_TOKENS``; the first
        block warms up.
    repeats : prefills of every cache; decoding goes on from the last.
    begin : called with the name of every step as it begins: a prefill of a cache, a block of it.

    Returns
    -------
    Rows: case, ttft_ms (prefill and the choice of the first token, compression included; the best
    of the repeats), decode_ms (median of a step), tokens_per_second, cache_bytes (all in), and
    the ratios speedup_vs_full, ttft_vs_full and cache_ratio against transformers'
    ``DynamicCache``.
    """
    if new_tokens < 2 * BLOCK_TOKENS:
        raise ValueError(f"expected at least {2 * BLOCK_TOKENS} new tokens, got {new_tokens}")
    if len(token_ids) < 1:
        raise ValueError("expected at least one token to prefill")
    check_length(model, len(token_ids) + new_tokens)
    runs = contenders(model, settings)
    for repeat in range(repeats):
        for run in runs if repeat % 2 == 0 else reversed(runs):
            begin(f"prefill, {run.name}")
            _prefill(model, token_ids[None], run)
    num_bytes = {run.name: _cache_bytes(run) for run in runs}
    blocks = new_tokens // BLOCK_TOKENS
    for block in range(blocks):
        for run in runs if block % 2 == 0 else reversed(runs):
            begin(f"tokens, {run.name}")
            _decode(model, run, count=block > 0)
    full = runs[0]
    rows = []
    for run in runs:
        step, first = statistics.median(run.step_seconds), min(run.prefill_seconds)
        rows.append(
            {
                "benchmark": "generate",
                "case": run.name,
                "ttft_ms": first * 1e3,
                "decode_ms": step * 1e3,
                "tokens_per_second": 1 / step,
                "cache_bytes": num_bytes[run.name],
                "speedup_vs_full": statistics.median(full.step_seconds) / step,
                "ttft_vs_full": first / min(full.prefill_seconds),
                "cache_ratio": num_bytes[FULL] / num_bytes[run.name],
                "prompt_tokens": len(token_ids),
                "new_tokens": blocks * BLOCK_TOKENS,
                "dtype": str(model.dtype).removeprefix("torch."),
                **({} if run.settings is None else run.settings.columns()),
            }
        )
    return rows


def _prefill(model: PreTrainedModel, tokens: Tensor, run: Contender) -> None:
    run.cache = None  # of the repeat before
    cache = run.make()
    with attention(model, run.implementation):
        start = time.perf_counter()
        run.token = prefill(model, tokens, cache).argmax(-1)[None]
        run.prefill_seconds.append(time.perf_counter() - start)
    run.cache = cache


def _decode(model: PreTrainedModel, run: Contender, count: bool) -> None:
    with attention(model, run.implementation):
        for step in range(BLOCK_TOKENS):
            start = time.perf_counter()
            logits = model(run.token, **cache_argument(run.cache)).logits
            run.token = logits[:, -1].argmax(-1)[None]
            if count and step > 0:
                run.step_seconds.append(time.perf_counter() - start)


def _cache_bytes(run: Contender) -> int:
    """Bytes of a prefilled cache, all in."""
    if isinstance(run.cache, SVDqCache):
        return run.cache.memory_report().total_bytes
    if isinstance(run.cache, DynamicCache) and run.name == FULL:
        return full_cache_bytes(run.cache)
    return _tensor_bytes(run.cache)


def _tensor_bytes(owner: object, seen: set[int] | None = None) -> int:
    """Bytes of every tensor that hangs on an object."""
    seen = set() if seen is None else seen
    if id(owner) in seen:
        return 0
    seen.add(id(owner))
    if isinstance(owner, Tensor):
        # Quantized tensors of quanto hold the real ones under these names.
        parts = [getattr(owner, name, None) for name in ("_data", "_scale", "_shift")]
        if all(part is None for part in parts):
            return owner.nbytes
        return sum(_tensor_bytes(part, seen) for part in parts if part is not None)
    if isinstance(owner, dict):
        return sum(_tensor_bytes(value, seen) for value in owner.values())
    if isinstance(owner, (list, tuple)):
        return sum(_tensor_bytes(value, seen) for value in owner)
    return _tensor_bytes(vars(owner), seen) if hasattr(owner, "__dict__") else 0
