"""A full cache that is compressed into an empty one."""

import pytest
import torch
from transformers import DynamicCache

from cache_support import assert_same_state, make_model, make_tokens, snapshot
from svdq import SVDqCache, cache_argument
from svdq_bench.quality.prefix import read_prefix


@torch.inference_mode()
def full_cache(model, tokens):
    cache = DynamicCache(config=model.config)
    model(tokens, **cache_argument(cache))
    return cache


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "paper-1.25"},
        {"rope": "post"},
        {"k_bits": 1.0},
        {"k_bits": 1.0, "v_bits": 2.5},
        {"lambda_": 0.01},
    ],
    ids=["default", "paper", "post", "allocated", "allocated values", "price"],
)
@torch.inference_mode()
def test_it_is_the_cache_that_a_prefill_makes(settings):
    model, tokens = make_model(), make_tokens(1, 400)
    expected = SVDqCache(model.config, **settings)
    model(tokens, **cache_argument(expected))
    cache = SVDqCache(model.config, **settings)
    prefix = read_prefix(model, tokens)
    cache.prefill_from(prefix.cache, prefix.query_energy, prefix.samples)
    assert cache.memory_report().packed_numbers > 0
    assert_same_state(snapshot(cache), snapshot(expected))


@torch.inference_mode()
def test_what_does_not_fit_is_refused_and_changes_nothing():
    model, tokens = make_model(), make_tokens(1, 400)
    full = full_cache(model, tokens)
    cache = SVDqCache(model.config, preset="paper-1.25")
    with pytest.raises(ValueError, match="of the same model"):
        cache.prefill_from(DynamicCache())
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="layer 0: .* query_energy is needed"):
        SVDqCache(model.config, k_bits=1).prefill_from(full)
    energy = read_prefix(model, tokens).query_energy
    with pytest.raises(ValueError, match="layer 0: to allocate bits of values, queries are needed"):
        SVDqCache(model.config, kv_bits=2).prefill_from(full, energy)
    cache.prefill_from(full)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="needs an empty cache, got 400 tokens"):
        cache.prefill_from(full)
    assert_same_state(snapshot(cache), before)
