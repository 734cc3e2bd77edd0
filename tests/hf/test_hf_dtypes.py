"""Autocast, default dtypes and what "sdpa" would drop without a word."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from cache_support import CONFIGS, FINE, make_model, make_tokens
from svdq import SVDqCache, cache_argument
from svdq.hf.attention import DROPPED, svdq_attention

CHUNKS = (300, 1, 100, 1)


def logits(model, cache):
    with torch.inference_mode():
        return [
            model(make_tokens(2, n, seed=i), **cache_argument(cache)).logits
            for i, n in enumerate(CHUNKS)
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{"preset": "exact"}, FINE, {}], ids=str)
def test_autocast_over_a_float32_model(dtype, settings):
    """Keys are rotated in float32 and values are not: SDPA casts both, and so does the cache."""
    with torch.autocast("cpu", dtype):
        expected = logits(make_model("llama", "sdpa"), DynamicCache(config=CONFIGS["llama"]))
        cache = SVDqCache(CONFIGS["llama"], **settings)
        actual = logits(make_model("llama"), cache)
    assert cache.layers[0].dtype == dtype
    if not settings:
        return
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 0.05 * theirs.abs().max()


def test_bases_are_fitted_as_outside_of_autocast():
    model, caches = make_model("llama", dtype=torch.bfloat16), []
    for enabled in (False, True):
        caches.append(SVDqCache(CONFIGS["llama"]))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.inference_mode():
            model(make_tokens(1, 400), **cache_argument(caches[-1]))
    bases = [cache.layers[0].tokens.packed.codec.basis for cache in caches]
    assert torch.equal(*bases)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_bits": 2.5},
        {"rope": "hybrid", "k_bits": 1.25},
        {"rope": "rotated-mean"},
        {"schedule": [4, 2, 1, 0], "outlier_fraction": 0.05},
        {"sparse_budget": 64},
        {"sparse_budget": 64, "sparse_scorer": "landmarks"},
        {"refit_drift": 1.05, "min_fit_tokens": 80, "residual_length": 0},
        {"max_cache_len": 600},
    ],
    ids=str,
)
def test_any_default_dtype(default, settings):
    model, before = make_model("llama"), torch.get_default_dtype()
    expected = model.generate(
        make_tokens(2, 300),
        max_new_tokens=70,
        do_sample=False,
        disable_compile=True,
        **cache_argument(SVDqCache(CONFIGS["llama"], **settings)),
    )
    torch.set_default_dtype(default)
    try:
        cache = SVDqCache(CONFIGS["llama"], **settings)
        actual = model.generate(
            make_tokens(2, 300),
            max_new_tokens=70,
            do_sample=False,
            disable_compile=True,
            **cache_argument(cache),
        )
        assert cache.memory_report().total_bytes == cache.allocated_bytes()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", DROPPED)
def test_what_sdpa_would_drop_is_refused(name):
    query = torch.randn(1, 4, 3, 64)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    with pytest.raises(NotImplementedError, match=f"does not support {name}, which"):
        svdq_attention(module, query, query, query, None, **{name: torch.ones(4)})
    svdq_attention(module, query, query, query, None, **{name: None})


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_outputs_are_contiguous(family, monkeypatch):
    """As SDPA's are: models view them."""
    found = []

    def watched(*args, **kwargs):
        out = svdq_attention(*args, **kwargs)
        found.append(out[0].is_contiguous())
        return out

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "svdq", watched)
    for settings in ({}, {"preset": "exact"}, {"min_fit_tokens": 500}):
        logits(make_model(family), SVDqCache(CONFIGS[family], **settings))
    assert len(found) >= 3 * 2 * len(CHUNKS) and all(found)


def test_prompts_in_any_grad_mode():
    """A system prompt under inference mode, too short to pack, goes on outside of it."""
    modes = (torch.inference_mode, torch.no_grad)
    for settings in ({}, {"kv_bits": 3.0}, {"rope": "hybrid"}, {"outlier_fraction": 0.05}):
        for first in modes:
            for then in modes:
                model, cache = make_model("llama"), SVDqCache(CONFIGS["llama"], **settings)
                for mode, length in ((first, 100), (then, 200), (first, 70), (then, 1)):
                    with mode():
                        out = model(make_tokens(1, length), **cache_argument(cache))
                assert out.logits.isfinite().all() and cache.get_seq_length() == 371
