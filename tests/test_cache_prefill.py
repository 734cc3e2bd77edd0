"""A full cache that is compressed into an empty one."""

import pytest
import torch
from transformers import DynamicCache

from cache_support import assert_same_state, make_model, make_tokens, snapshot
from svdq import SVDqCache


@torch.inference_mode()
def full_cache(model, tokens):
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    return cache


@pytest.mark.parametrize("rope", ["pre", "post"])
@torch.inference_mode()
def test_it_is_the_cache_that_a_prefill_makes(rope):
    model, tokens = make_model(), make_tokens(2, 400)
    model.set_attn_implementation("svdq")
    expected = SVDqCache(model.config, rope=rope)
    model(tokens, past_key_values=expected)
    model.set_attn_implementation("sdpa")
    cache = SVDqCache(model.config, rope=rope)
    cache.prefill_from(full_cache(model, tokens))
    assert cache.memory_report().packed_numbers > 0
    assert_same_state(snapshot(cache), snapshot(expected))


@torch.inference_mode()
def test_what_does_not_fit_is_refused_and_changes_nothing():
    model, tokens = make_model(), make_tokens(1, 400)
    full = full_cache(model, tokens)
    cache = SVDqCache(model.config)
    with pytest.raises(ValueError, match="of the same model"):
        cache.prefill_from(DynamicCache())
    assert cache.get_seq_length() == 0
    cache.prefill_from(full)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="needs an empty cache, got 400 tokens"):
        cache.prefill_from(full)
    assert_same_state(snapshot(cache), before)
