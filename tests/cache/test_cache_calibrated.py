"""Caches with a calibration: nothing of a prompt is fitted, and everything else works as before."""

import copy
from dataclasses import replace

import pytest
import torch

from cache_support import (
    CONFIGS,
    Driver,
    assert_same_state,
    decoded,
    make_model,
    make_tokens,
    snapshot,
)
from calibration_support import (
    SETTINGS,
    calibration,
    codec_bytes,
    feed,
    new_cache,
    prefilled,
    shared_bytes,
)
from svdq import SVDqCache, cache_argument
from svdq.cache.tensor_walk import held_bytes
from svdq.reference.keys import code_keys, decode_keys

STEADY = 8 + 64 + 64  # sinks, window and a page: the fewest tokens of which some are packed


@pytest.mark.parametrize("name", SETTINGS)
def test_pages_hold_the_codes_of_the_calibrated_codec(name):
    """Decoded keys are, by the formulas, those of the exact keys under the calibration."""
    exact = SVDqCache(CONFIGS["llama"], preset="exact")
    feed(exact, make_tokens(1, 300, seed=9))
    cache = prefilled(name=name)
    # The first layer's keys depend on no cache.
    layer, own = cache.svdq_layers[0], calibration(name).layers[0]
    keys = decoded(exact.svdq_layers[0])[0]
    if own.gain is not None:
        keys = keys * own.gain[0, :, None].float()
    codec = replace(own.codec.sequence(0), inv_freq=own.inv_freq)
    layout = layer.tokens.packed.layout
    assert layout == own.layout
    slots = layer.tokens.packed.slots[0]
    assert slots == 192
    expected = decode_keys(code_keys(keys[:, :slots], codec, layout), codec, layout)
    found = layer.tokens.packed.decoded_keys(0, 0, slots)
    # Codes next to the middle of two may differ by one: few keys do.
    close = (found - expected).abs().amax(2) < 1e-3 * expected.abs().max()
    assert close.float().mean() > 0.98


@pytest.mark.parametrize("length", [STEADY - 1, STEADY])
def test_packs_from_the_first_page(length):
    cache = prefilled(length)
    packed = [layer.tokens.packed.slots[0] for layer in cache.svdq_layers]
    assert packed == [0 if length < STEADY else 64] * 2
    feed(cache, make_tokens(1, 1))
    assert [layer.tokens.packed.slots[0] for layer in cache.svdq_layers] == [64] * 2
    # The same tokens one by one give the same pages.
    grown = new_cache()
    tokens = torch.cat([make_tokens(1, length, seed=9), make_tokens(1, 1)], dim=1)
    feed(grown, tokens[:, :20])
    for token in tokens[:, 20:].split(1, dim=1):
        feed(grown, token)
    for own, other in zip(grown.svdq_layers[:1], cache.svdq_layers[:1], strict=True):
        for x, y in zip(decoded(own), decoded(other), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_prompt_has_bytes_of_a_codec(name, batch):
    cache = prefilled(batch=batch, name=name)
    assert codec_bytes(cache) == (0, 0, 0, 0)
    report = cache.memory_report()
    assert report.calibration == shared_bytes(name)
    assert report.total_bytes == cache.allocated_bytes()
    assert report.prompt_bytes == report.total_bytes - shared_bytes(name)
    assert f"calibration{report.calibration:>19,} B" in str(report)
    cache.reset()
    assert cache.memory_report().total_bytes == cache.allocated_bytes() == shared_bytes(name)


def test_own_ranges_are_counted():
    cache = prefilled(name="pre", prompt_ranges=True, batch=2)
    basis, scale, mean, gain = codec_bytes(cache)
    assert (basis, gain) == (0, 0)
    ranks = [layer.layout.rank for layer in calibration().layers.values()]
    assert (scale, mean) == (2 * 4 * sum(ranks), 2 * 2 * 4 * 2 * 64)
    assert cache.memory_report().total_bytes == cache.allocated_bytes()


def test_caches_share_what_was_calibrated():
    caches = [prefilled(), prefilled(400)]
    alone = sum(cache.memory_report().prompt_bytes for cache in caches)
    assert held_bytes(caches) == alone + shared_bytes()
    copied = copy.deepcopy(caches[0])
    assert held_bytes([caches[0], copied]) == 2 * caches[0].memory_report().prompt_bytes + (
        shared_bytes()
    )
    assert_same_state(snapshot(copied), snapshot(caches[0]))
    feed(copied, make_tokens(1, 100))
    assert copied.memory_report().total_bytes == copied.allocated_bytes()


def test_prompts_have_pages_of_one_layout():
    first, second = prefilled(200), prefilled(900)
    layouts = [[x.tokens.packed.layout for x in cache.svdq_layers] for cache in (first, second)]
    assert layouts[0] == layouts[1]


@pytest.mark.parametrize(
    "settings", [{}, {"prompt_ranges": True}, {"refit_drift": 1.000001}], ids=str
)
def test_sequences_of_a_batch_are_as_if_alone(settings):
    tokens = make_tokens(2, 400, seed=4)
    batch = new_cache(**settings)
    feed(batch, tokens)
    together = feed(batch, make_tokens(1, 80).repeat(2, 1))
    for b in range(2):
        alone = new_cache(**settings)
        feed(alone, tokens[b : b + 1])
        expected = feed(alone, make_tokens(1, 80))
        torch.testing.assert_close(together[b : b + 1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{}, {"prompt_ranges": True}, {"refit_drift": 1.000001}], ids=str
)
@pytest.mark.parametrize("name", ["pre", "both"])
def test_files(tmp_path, name, settings):
    cache = prefilled(400, 2, name, **settings)
    cache.save(tmp_path / "cache")
    loaded = SVDqCache.load(tmp_path / "cache", CONFIGS["llama"], calibration=calibration(name))
    assert_same_state(snapshot(loaded), snapshot(cache))
    assert loaded.memory_report().total_bytes == loaded.allocated_bytes()
    assert loaded.memory_report().calibration == cache.memory_report().calibration
    assert loaded.domain_drift() == cache.domain_drift()
    new = make_tokens(2, 70, seed=2)
    assert torch.equal(feed(loaded, new), feed(cache, new))


def test_files_do_not_hold_what_is_shared(tmp_path):
    cache = prefilled(1000)
    cache.save(tmp_path / "cache")
    report, header = cache.memory_report(), 8000
    size = (tmp_path / "cache").stat().st_size
    assert size <= report.prompt_bytes - report.slack + header
    fits = {"config": CONFIGS["llama"]}
    with pytest.raises(ValueError, match="cache was packed with a calibration: give calibration="):
        SVDqCache.load(tmp_path / "cache", **fits)
    with pytest.raises(ValueError, match="cache was packed with another calibration"):
        SVDqCache.load(tmp_path / "cache", **fits, calibration=calibration("both"))
    plain = SVDqCache(CONFIGS["llama"], k_bits=2)
    feed(plain, make_tokens(1, 300))
    plain.save(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain was packed without a calibration"):
        SVDqCache.load(tmp_path / "plain", **fits, calibration=calibration())


@pytest.mark.parametrize(
    "settings", [{}, {"prompt_ranges": True}, {"refit_drift": 1.000001}], ids=str
)
@pytest.mark.parametrize("left", [10, 100, 250])
def test_crop(settings, left):
    tokens = make_tokens(2, 400, seed=9)
    cache = new_cache(**settings)
    feed(cache, tokens[:, :left])
    before = snapshot(cache) if left == 10 else None
    feed(cache, tokens[:, left:])
    cache.crop(-(400 - left))
    assert cache.get_seq_length() == left
    assert cache.memory_report().total_bytes == cache.allocated_bytes()
    if before is not None:  # all in the window, packed ones were dropped
        assert [layer.tokens.count(0) for layer in cache.svdq_layers] == [left] * 2
    again = feed(cache, tokens[:, left:])
    assert again.isfinite().all()
    if "refit_drift" not in settings:  # else stores that were opened last wait for tokens
        assert all(all(layer.tokens.packed.fitted) for layer in cache.svdq_layers)
    assert all(layer.tokens.count(b) == 400 for layer in cache.svdq_layers for b in range(2))


def test_beams_and_selected_sequences():
    cache = prefilled(300, 2)
    states = snapshot(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    assert codec_bytes(cache) == (0, 0, 0, 0)
    assert cache.memory_report().total_bytes == cache.allocated_bytes()
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert_same_state(snapshot(cache), states)


@pytest.mark.parametrize("name", SETTINGS)
def test_static_capacity(name):
    found = calibration(name)
    one_layer = replace(
        found, model=found.model | {"num_hidden_layers": 1}, layers={0: found.layers[0]}
    )
    grown, static = (
        Driver(2, calibration=one_layer, **options) for options in ({}, {"max_cache_len": 600})
    )
    for length in (300, *[1] * 70):
        new = grown.draw(length)
        torch.testing.assert_close(static.attend(*new), grown.attend(*new), rtol=0, atol=0)
        assert static.layer.is_static
    assert codec_bytes(static.cache) == (0, 0, 0, 0)
    assert static.cache.memory_report().total_bytes == static.cache.allocated_bytes()
    with pytest.raises(ValueError, match="max_cache_len does not go together with refit_drift"):
        new_cache(max_cache_len=600, refit_drift=2.0)


@pytest.mark.parametrize("scorer", ["latent", "landmarks"])
def test_sparsity(scorer):
    tokens, new = make_tokens(2, 600, seed=9), make_tokens(2, 1)
    outputs = {}
    for budget in (None, 100000, 64):
        cache = new_cache(sparse_budget=budget, sparse_scorer=scorer)
        feed(cache, tokens)
        outputs[budget] = feed(cache, new)
        assert codec_bytes(cache) == (0, 0, 0, 0)
        assert cache.memory_report().total_bytes == cache.allocated_bytes()
    assert torch.equal(outputs[100000], outputs[None])
    assert not torch.equal(outputs[64], outputs[None])
    assert cache.read_report().attended == 64


def test_prefill_from_needs_no_queries():
    from svdq_bench.quality.prefix import read_prefix

    tokens = make_tokens(1, 300, seed=9)
    cache = new_cache("both")
    cache.prefill_from(read_prefix(make_model("llama", "sdpa"), tokens).cache)
    for own, other in zip(cache.svdq_layers, prefilled(name="both").svdq_layers, strict=True):
        assert own.tokens.packed.slots == other.tokens.packed.slots


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope": "post"}, "is calibrated for rope='pre', the cache asks for 'post'"),
        ({"k_bits": 1.0}, "is calibrated for k_bits=2.0, the cache asks for 1.0"),
        ({"preset": "paper-1.25"}, "is calibrated for schedule=None"),
        ({"schedule": [4, 2]}, "is calibrated for schedule=None"),
        ({"v_bits": 2}, "is calibrated for v_bits=4, the cache asks for 2"),
        ({"query_weighted": False}, "is calibrated for query_weighted=True"),
        ({"outlier_fraction": 0.01}, "outlier_fraction does not go together with a calibration"),
        ({"profile": "file"}, "give it or a profile, not both"),
    ],
    ids=str,
)
def test_settings_that_contradict_the_calibration(settings, message):
    with pytest.raises(ValueError, match=message):
        new_cache(**settings)


def test_settings_that_agree_with_the_calibration():
    settings = new_cache(k_bits=2, rope="pre", residual_length=32, v_bits=4).settings
    assert (settings.k_bits, settings.residual_length) == (2.0, 32)
    assert new_cache("schedule", schedule=[4, 4, 2, 0]).settings.schedule == (4, 4, 2, 0)


def test_own_ranges_need_a_calibration_in_one_space():
    with pytest.raises(ValueError, match="prompt_ranges is for caches with a calibration"):
        SVDqCache(CONFIGS["llama"], k_bits=2, prompt_ranges=True)
    with pytest.raises(ValueError, match="prompt_ranges needs keys that are packed with rope"):
        new_cache("hybrid", prompt_ranges=True)


def test_keys_of_other_heads():
    cache = new_cache()
    states = torch.zeros(1, 1, 4, 64)
    with pytest.raises(ValueError, match=r"\(KV heads, head_dim\) \(2, 64\), the keys \(1, 64\)"):
        cache.update(states, states, 0)


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "phi"])
def test_other_families(family):
    from calibration_support import windows
    from svdq_bench.quality.calibration import Windows, calibrate_bases

    found = calibrate_bases(
        make_model(family, "sdpa"), [Windows("a", windows(), [])], {"kv_bits": 3.0}
    )
    model, cache = make_model(family), SVDqCache(CONFIGS[family], calibration=found)
    with torch.inference_mode():
        model(make_tokens(2, 300), **cache_argument(cache))
        model(make_tokens(2, 40), **cache_argument(cache))
    assert all(layer.tokens.packed.slots == [256, 256] for layer in cache.svdq_layers)
    report = cache.memory_report()
    assert report.key_basis == 0 and report.total_bytes == cache.allocated_bytes()
