"""The benchmark of whole models: what is run and compared. No test depends on a time."""

import pytest

from cache_support import make_model, make_tokens
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.speed import generate
from svdq_bench.speed.generate import BLOCK_TOKENS, FULL, bench_generate


def test_rows_compare_with_the_full_cache(monkeypatch):
    monkeypatch.setattr(generate, "quantized_backend", lambda: None)
    model, steps = make_model("llama"), []
    settings = [CacheSettings("paper-2.25", rope=rope) for rope in ("post", "pre")]
    rows = bench_generate(
        model, make_tokens(1, 300)[0], settings, 2 * BLOCK_TOKENS, 2, begin=steps.append
    )
    assert [row["case"] for row in rows] == [FULL, *(each.label for each in settings)]
    assert len(steps) == 3 * (2 + 2)
    full = rows[0]
    config = model.config
    numbers = 2 * config.num_key_value_heads * 300 * config.head_dim * config.num_hidden_layers
    assert full["cache_bytes"] == numbers * model.dtype.itemsize
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 / row["decode_ms"])
        assert row["speedup_vs_full"] == pytest.approx(full["decode_ms"] / row["decode_ms"])
        assert row["ttft_vs_full"] == pytest.approx(row["ttft_ms"] / full["ttft_ms"])
        assert row["cache_ratio"] == pytest.approx(full["cache_bytes"] / row["cache_bytes"])
    assert rows[1]["rope"] == "post"


def test_too_few_tokens_are_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match="at least 16 new tokens, got 15"):
        bench_generate(model, make_tokens(1, 10)[0], [], 15)
    with pytest.raises(ValueError, match="at least one token to prefill"):
        bench_generate(model, make_tokens(1, 10)[0, :0], [], 16)
