"""Profiles: bit allocations known before a prompt is."""

from dataclasses import replace

import pytest
import torch

from cache_support import CONFIGS, make_model, make_tokens
from svdq import Profile, SVDqCache
from svdq.fit.allocation import overhead_bits
from svdq.fit.allocator import Budget, Demand, solve_widths
from svdq_bench.quality.calibrate import measure_profile
from svdq_bench.quality.prefix import read_prefix


@pytest.fixture(scope="module")
def profile():
    model = make_model("llama", "sdpa")
    return measure_profile(model, [make_tokens(1, 400, seed) for seed in range(2)])


def prefilled(model, tokens, **settings):
    prefix = read_prefix(model, tokens)
    cache = SVDqCache(model.config, **settings)
    cache.prefill_from(prefix.cache, prefix.query_energy, prefix.samples)
    return cache


def layouts(cache):
    return [layer.tokens.packed.layout for layer in cache.svdq_layers]


def test_spectra_are_those_that_caches_allocate_by(profile):
    """A cache alone, on the prompt that was measured, solves for the same bands."""
    model, tokens = make_model("llama", "sdpa"), make_tokens(1, 400)
    own = measure_profile(model, [tokens])
    alone = prefilled(model, tokens, k_bits=1.0)
    by_profile = prefilled(model, tokens, k_bits=1.0, profile=own)
    assert layouts(alone) == layouts(by_profile)
    overhead = overhead_bits(64, 400)
    demands = [Demand(own.spectra[i], overhead) for i in (0, 1)]
    _, widths = solve_widths(demands, Budget(k_bits=1.0))
    expected = [tuple(map(tuple, x.bands.tolist())) for x in widths]
    assert [layout.bands for layout in layouts(by_profile)] == expected
    assert set(profile.spectra) == {0, 1} and profile.num_tokens == 400
    assert not torch.equal(profile.spectra[0], own.spectra[0])


def test_values_are_allocated_by_what_was_measured():
    model, tokens = make_model("llama", "sdpa"), make_tokens(1, 400)
    own = measure_profile(model, [tokens])
    budgets = {"kv_bits": 2.0}, {"k_bits": 1.0, "v_bits": 2.5}
    for settings in budgets:
        settings = settings | {"residual_length": 0}  # as in what was measured
        alone = prefilled(model, tokens, **settings)
        assert layouts(alone) == layouts(prefilled(model, tokens, profile=own, **settings))
    with pytest.raises(ValueError, match="does not say what values lose"):
        SVDqCache(model.config, kv_bits=2.0, profile=replace(own, value_loss={}))


@pytest.mark.parametrize("scope", ["model", "layer", "head"])
def test_prompts_have_pages_of_one_size(profile, scope):
    model = make_model("llama", "sdpa")
    settings = {"k_bits": 1.0, "allocate_across": scope, "profile": profile}
    first, second = (prefilled(model, make_tokens(1, n, n), **settings) for n in (400, 900))
    assert layouts(first) == layouts(second)


def test_files(profile, tmp_path):
    profile.save(tmp_path / "profile")
    loaded = Profile.load(tmp_path / "profile")
    assert (loaded.rope, loaded.pre_channels, loaded.query_weighted) == ("pre", 8, True)
    for layer, spectrum in profile.spectra.items():
        assert torch.equal(loaded.spectra[layer], spectrum)
        assert torch.equal(loaded.value_loss[layer], profile.value_loss[layer])
    model, tokens = make_model("llama", "sdpa"), make_tokens(1, 400)
    cache = prefilled(model, tokens, lambda_=0.1, profile=tmp_path / "profile")
    assert layouts(cache) == layouts(prefilled(model, tokens, lambda_=0.1, profile=profile))
    cache.save(tmp_path / "cache")
    assert layouts(SVDqCache.load(tmp_path / "cache", model.config)) == layouts(cache)
    with pytest.raises(ValueError, match="no svdq profile"):
        Profile.load(tmp_path / "cache")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "llama",
            {"preset": "paper-1.25"},
            "a profile allocates bits: give k_bits, kv_bits or lambda_",
        ),
        ("llama", {"k_bits": 1, "rope": "post"}, "the profile is for"),
        ("llama", {"k_bits": 1, "query_weighted": False}, "the profile is for"),
        ("gemma3", {"k_bits": 1}, r"the profile is of layers \[0, 1\], the model compresses \[1\]"),
    ],
)
def test_profiles_that_do_not_fit(profile, family, settings, message):
    with pytest.raises(ValueError, match=message):
        SVDqCache(CONFIGS[family], profile=profile, **settings)


def test_prompts_that_are_too_short():
    model = make_model("llama", "sdpa")
    with pytest.raises(ValueError, match="at least one prompt"):
        measure_profile(model, [])
    with pytest.raises(ValueError, match="a prompt of 100 tokens is too short"):
        measure_profile(model, [make_tokens(1, 100)])
