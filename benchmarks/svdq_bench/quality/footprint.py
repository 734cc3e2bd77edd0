"""What a number of keys and of values takes, part by part, at several lengths of a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from svdq.cache.memory import MemoryReport
from svdq_bench.quality.memory import bf16_bytes, full_cache_bytes, svdq_cache_bytes
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.models import max_tokens
from svdq_bench.quality.prefix import read_prefix

# Columns of a row, and the parts of a report that each is the sum of.
PARTS = {
    "key_code_bits": ("key_codes",),
    "key_basis_bits": ("key_basis", "key_scale", "key_mean", "key_gain"),
    "key_exact_bits": ("sink_keys", "window_keys", "outlier_keys"),
    "value_code_bits": ("value_codes",),
    "value_scale_bits": ("value_scales",),
    "value_exact_bits": ("sink_values", "window_values"),
}


def evaluate_memory(
    model: PreTrainedModel,
    token_ids: Tensor,
    methods: Sequence[CacheSettings],
    lengths: Sequence[int],
    start: int = 5000,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Measure caches right after the prefill of contexts of several lengths.

    A length above what the model can read is computed: the layouts of the longest context that it
    can read, with that many tokens. Such rows have no parts.

    Parameters
    ----------
    model : a causal language model with its default attention; what stays exact has its dtype.
    token_ids : [T] int64, the text.
    methods : caches to measure.
    lengths : tokens of the contexts.
    start : first token of each.
    begin : called with the name of each of the ``len(lengths) * len(methods)`` steps as it begins.

    Returns
    -------
    One row for each method and length: bits a number by part (:data:`PARTS`, and ``key_bits`` and
    ``value_bits`` for all of them), bytes, and times smaller than the full cache.
    """
    limit = max_tokens(model.config) or max(lengths)
    read = sorted({min(length, limit) for length in lengths})
    for length in read:
        if start < 0 or start + length > len(token_ids):
            raise ValueError(
                f"a context of {length} tokens at token {start} does not fit into the text of "
                f"{len(token_ids)} tokens"
            )
    rows = []
    for length in read:
        asked = [n for n in lengths if min(n, limit) == length]
        prefix = read_prefix(model, token_ids[None, start : start + length])
        for method in methods:
            cache = method.compress(prefix)
            for n in asked:
                begin(f"{method.label}, {n:,} tokens")
                row = {"benchmark": "memory", **method.columns(), "tokens": n}
                if n == length:
                    row |= method.bits(cache) | _parts(cache.memory_report())
                    full, held = bf16_bytes(cache)
                    row |= {"cache_bytes": cache.memory_report().total_bytes}
                    row |= {"times_smaller_bf16": full / held}
                else:
                    size = svdq_cache_bytes(cache, n)
                    full = full_cache_bytes(prefix.cache, n)
                    row |= {"cache_bytes": size, "times_smaller_bf16": full / size}
                rows.append(row)
    order = {method.label: i for i, method in enumerate(methods)}
    return sorted(rows, key=lambda row: (order[row["method"]], row["tokens"]))


def _parts(report: MemoryReport) -> dict[str, float]:
    """Bits by part of a number of the keys, or as many of the values."""
    bits = {
        column: 8 * sum(report.parts[part] for part in parts) / report.key_numbers
        for column, parts in PARTS.items()
    }
    return bits | {"key_bits": report.key_bits, "value_bits": report.value_bits}
