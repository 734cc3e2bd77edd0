"""Drift of sequences from what a calibration saw: measured, told, and fitted where asked."""

import math
from dataclasses import replace

import pytest
import torch

from cache_support import CONFIGS, decoded, make_tokens
from calibration_support import calibration, codec_bytes, feed, new_cache, prefilled
from svdq import SVDqCache


def reference_drift(cache, length):
    """Mean over layers and heads of the error of packed keys over that of the calibration."""
    exact = SVDqCache(CONFIGS["llama"], preset="exact")
    feed(exact, make_tokens(1, length, seed=9))
    ratios = []
    for own, other in zip(cache.svdq_layers, exact.svdq_layers, strict=True):
        slots = own.tokens.packed.slots[0]
        found = calibration().layers[own.index]
        keys = decoded(other)[0][:, 8:slots] * found.gain[0, :, None].float()
        held = own.tokens.packed.decoded_keys(0, 8, slots - 8)
        error = (keys - held).double().square().sum(2).mean(1)
        ratios.append(float((error / found.error).mean()))
    return sum(ratios) / len(ratios)


def test_drift_is_relative_to_what_was_calibrated():
    cache = new_cache()
    assert cache.domain_drift() == []
    feed(cache, make_tokens(1, 100, seed=9))
    assert math.isnan(cache.domain_drift()[0])
    cache = prefilled(400)
    assert cache.domain_drift() == [pytest.approx(reference_drift(cache, 400), rel=1e-2)]
    assert cache.drift()[0] == [pytest.approx(cache.domain_drift()[0], rel=0.5)]


def test_sequences_out_of_the_domain_are_told():
    bounded = replace(calibration(), drift_bound=1.5)
    cache = SVDqCache(CONFIGS["llama"], calibration=bounded)
    near = make_tokens(1, 400, seed=9)
    feed(cache, torch.cat([near, near.flip(1)]))
    assert cache.out_of_domain() == [False, False]
    narrow = replace(calibration(), drift_bound=0.5)
    cache = SVDqCache(CONFIGS["llama"], calibration=narrow)
    feed(cache, near)
    assert cache.out_of_domain() == [True]
    for ask in (SVDqCache.out_of_domain, SVDqCache.domain_drift):
        with pytest.raises(ValueError, match="this cache has no calibration"):
            ask(SVDqCache(CONFIGS["llama"]))


def test_a_sequence_is_fitted_where_asked():
    """Only the one whose keys err more, and it errs less then; its pages stay as large."""
    tokens = torch.cat([make_tokens(1, 400, seed=9), make_tokens(1, 400, seed=3)])
    drifts = prefilled_of(tokens).drift()[0]
    bound = sum(drifts) / 2
    cache = prefilled_of(tokens, refit_drift=max(bound, 1.0001))
    plain = prefilled_of(tokens)
    layer, other = cache.svdq_layers[0], plain.svdq_layers[0]
    assert layer.tokens.packed.layout == other.tokens.packed.layout
    fitted = [not same(layer, other, b) for b in range(2)]
    assert fitted == [drift > max(bound, 1.0001) for drift in drifts]
    assert cache.memory_report().total_bytes == cache.allocated_bytes()


def prefilled_of(tokens, **settings):
    cache = new_cache(**settings)
    feed(cache, tokens)
    return cache


def same(layer, other, b):
    return all(torch.equal(x, y) for x, y in zip(decoded(layer, b), decoded(other, b), strict=True))


def test_a_fitted_sequence_errs_less_and_says_why():
    shifted = calibration()
    # A calibration of other keys: the same codec with rows of the basis turned about.
    layers = {
        i: replace(x, codec=replace(x.codec, basis=x.codec.basis.flip(2).contiguous()), _copies={})
        for i, x in shifted.layers.items()
    }
    wrong = replace(shifted, layers=layers, drift_bound=1.5)
    tokens = make_tokens(1, 400, seed=9)
    caches = {}
    for bound in (None, 1.5):
        caches[bound] = SVDqCache(CONFIGS["llama"], calibration=wrong, refit_drift=bound)
        feed(caches[bound], tokens)
    assert caches[None].out_of_domain() == caches[1.5].out_of_domain() == [True]
    assert caches[1.5].drift() == [[pytest.approx(1, abs=1e-6)]] * 2
    assert codec_bytes(caches[None]) == (0, 0, 0, 0) and codec_bytes(caches[1.5])[0] > 0
    exact = SVDqCache(CONFIGS["llama"], preset="exact")
    feed(exact, tokens)
    errors = {
        bound: float((decoded(x.svdq_layers[0])[0] - decoded(exact.svdq_layers[0])[0]).norm())
        for bound, x in caches.items()
    }
    assert errors[1.5] < 0.8 * errors[None], errors
    # Short prompts, which cannot be fitted, begin with the calibration all the same.
    short = SVDqCache(CONFIGS["llama"], calibration=wrong, refit_drift=1.5)
    feed(short, tokens[:, :200])
    assert codec_bytes(short) == (0, 0, 0, 0)
    # Once enough tokens have followed, later pages get a basis of their own.
    for start in range(200, 400, 50):
        feed(short, tokens[:, start : start + 50])
    feed(short, make_tokens(1, 400, seed=1))
    assert [len(layer.tokens.stores) for layer in short.svdq_layers] == [2, 2]
    assert short.memory_report().total_bytes == short.allocated_bytes()
    assert short.out_of_domain() == [True]
