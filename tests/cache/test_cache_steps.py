"""A call that fails in one layer leaves the cache as it was in all of them."""

import copy

import pytest
import torch
from transformers import DynamicCache

from cache_support import (
    CONFIGS,
    Driver,
    assert_same_state,
    decoded,
    make_model,
    make_tokens,
    snapshot,
)
from calibration_support import calibration
from svdq import SVDqCache, cache_argument
from svdq.cache.cache import CROP_ZERO_REMOVES

PROMPT = 400
SETTINGS = {
    "default": {},
    "no window": {"residual_length": 0, "k_bits": 2.0},
    "schedule": {"schedule": [4, 2, 1, 0]},
    "hybrid": {"rope": "hybrid", "k_bits": 1.25},
    "outliers": {"outlier_fraction": 0.05, "residual_length": 0},
    "landmarks": {"sparse_budget": 64, "sparse_scorer": "landmarks", "residual_length": 0},
    "drift": {"refit_drift": 1.05, "residual_length": 0, "min_fit_tokens": 80},
    "exact": {"preset": "exact"},
    "waiting": {"kv_bits": 2.5, "min_fit_tokens": 430},
    "static": {"max_cache_len": 1000},
    "calibrated": {"calibration": "pre", "residual_length": 0},
    "own ranges": {"calibration": "both", "prompt_ranges": True, "min_fit_tokens": 430},
    "out of domain": {"calibration": "pre", "refit_drift": 1.000001, "min_fit_tokens": 430},
}


class Failure(Exception):
    """What something outside of the cache raises."""


def spoil_values(layer):
    """Values that no code can hold: 1e9, and NaN where they are exact."""
    weight = layer.self_attn.v_proj.weight
    kept = weight.data.clone()
    weight.data[0] = torch.nan
    return lambda: weight.data.copy_(kept)


def fail_in_the_mlp(layer):
    def fail(*_):
        raise Failure

    return layer.mlp.register_forward_pre_hook(fail).remove


def fail_in_attention(layer):
    def fail(*_):
        raise KeyboardInterrupt

    return layer.self_attn.o_proj.register_forward_pre_hook(fail).remove


def prefilled(family, settings, batch=2, prompt=PROMPT):
    if "calibration" in settings:  # before the model is made, whose configuration it changes
        settings = settings | {"calibration": calibration(settings["calibration"], family)}
    model = make_model(family)
    cache = SVDqCache(model.config, **settings)
    mask = torch.ones(batch, prompt, dtype=torch.long)
    mask[0, :3] = 0
    with torch.inference_mode():
        model(make_tokens(batch, prompt), attention_mask=mask, **cache_argument(cache))
    return model, cache


def state(cache):
    cache.memory_report()  # brings lengths back from a static cache
    others = [
        (layer.keys, layer.get_seq_length())
        for layer in cache.layers
        if layer not in cache.svdq_layers
    ]
    return snapshot(cache), others


def fails(model, cache, break_layer, index, tokens):
    """Make a call fail in layer ``index``."""
    mend = break_layer(model.model.layers[index])
    failure = pytest.raises((ValueError, RuntimeError, Failure, KeyboardInterrupt))
    with torch.inference_mode(), failure:
        model(tokens, **cache_argument(cache))
    mend()


@pytest.mark.parametrize("length", [1, 5, 70, 130])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_refused_step_changes_nothing(name, length):
    if name == "static" and (length <= 64 or CROP_ZERO_REMOVES):
        pytest.skip("a static step reads nothing; transformers 4 reads its length")
    model, cache = prefilled("llama", SETTINGS[name])
    control, before = copy.deepcopy(cache), state(cache)
    fails(model, cache, spoil_values, 1, make_tokens(2, length, seed=1))
    assert cache.get_seq_length() == PROMPT
    assert_same_state(state(cache), before)
    assert cache.memory_report().total_bytes == cache.allocated_bytes()
    with torch.inference_mode():
        for n in (1, 64, 100, 1):
            tokens = make_tokens(2, n, seed=n)
            expected = model(tokens, **cache_argument(control)).logits
            assert torch.equal(model(tokens, **cache_argument(cache)).logits, expected)


@pytest.mark.parametrize("break_layer", [fail_in_the_mlp, fail_in_attention, spoil_values])
@pytest.mark.parametrize(("family", "index"), [("llama", 0), ("gemma3", 0), ("gemma3", 1)])
@pytest.mark.parametrize("length", [1, 100])
def test_a_call_that_stops_anywhere(family, index, break_layer, length):
    """A cache does not see other parts of a model fail; it says so when it is used again."""
    model, cache = prefilled(family, {"residual_length": 0})
    control, before = copy.deepcopy(cache), state(cache)
    fails(model, cache, break_layer, index, make_tokens(2, length, seed=1))
    tokens = make_tokens(2, 1, seed=2)
    with torch.inference_mode():
        expected = model(tokens, **cache_argument(control)).logits
        if cache._step.is_open:
            with pytest.raises(RuntimeError, match="has been taken back in all of them"):
                model(tokens, **cache_argument(cache))
            assert_same_state(state(cache), before)
        if cache.get_seq_length() == PROMPT:  # else the call failed behind the last layer
            assert torch.equal(model(tokens, **cache_argument(cache)).logits, expected)
        else:
            assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT + length] * 2


@pytest.mark.parametrize("settings", [{}, {"kv_bits": 3.0}, {"preset": "exact"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_refused_prompt_leaves_an_empty_cache(family, settings):
    model = make_model(family)
    cache, control = (SVDqCache(model.config, **settings) for _ in range(2))
    fails(model, cache, spoil_values, 1, make_tokens(1, PROMPT))
    assert cache.get_seq_length() == 0
    assert cache.memory_report().total_bytes == cache.allocated_bytes()
    tokens = make_tokens(1, 500, seed=3)
    with torch.inference_mode():
        expected = model(tokens, **cache_argument(control)).logits
        assert torch.equal(model(tokens, **cache_argument(cache)).logits, expected)
    assert_same_state(snapshot(cache), snapshot(control))


@pytest.mark.parametrize("change", ["crop", "reorder_cache", "batch_select_indices", "save"])
def test_changes_after_a_call_that_stopped(change, tmp_path):
    model, cache = prefilled("llama", {})
    control = copy.deepcopy(cache)
    fails(model, cache, fail_in_the_mlp, 0, make_tokens(2, 70, seed=1))
    argument = {"crop": -10, "save": tmp_path / "cache"}.get(change, torch.tensor([1, 0]))
    for one in (cache, control):
        getattr(one, change)(argument)
    assert_same_state(snapshot(cache), snapshot(control))


def test_copies_share_no_pages_that_a_refused_step_freed():
    """Beams: a part-full page is copied before one of its owners goes on, and given back."""
    model, cache = prefilled("llama", {"residual_length": 0})
    cache.crop(-30)
    cache.batch_repeat_interleave(2)
    before = state(cache)
    fails(model, cache, spoil_values, 1, make_tokens(4, 130, seed=1))
    assert_same_state(state(cache), before)
    pool = cache.layers[0].tokens.packed.pool
    assert pool.num_used == len({page for own in pool.pages for page in own})


def test_values_that_could_not_leave_the_window_are_refused():
    """Else every step would fail once they do."""
    driver = Driver(k_bits=2.0)
    driver.feed(300)
    query, keys, values = driver.draw(1)
    values[0, 1, 0, 3] = 7e4
    with pytest.raises(ValueError, match="at most 65504 .* got 7e.04; v_bits='exact' takes them"):
        driver.attend(query, keys, values)
    assert driver.cache.get_seq_length() == 300
    driver.feed(100)
    exact = Driver(k_bits=2.0, v_bits="exact")
    exact.feed(300)
    exact.attend(query, keys, values)
    exact.feed(100)
    assert (decoded(exact.layer)[1] == 7e4).sum() == 1


@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_for_another_number_of_layers(layers):
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = layers
    model, cache = make_model("llama"), SVDqCache(config)
    with torch.inference_mode(), pytest.raises(ValueError, match=f"model of {layers} layers"):
        model(make_tokens(1, PROMPT), **cache_argument(cache))
    assert cache.get_seq_length() == 0


def test_the_control_stays_a_control():
    """The same model on a DynamicCache takes what the cache refused: nothing else was wrong."""
    model = make_model("llama")
    mend = spoil_values(model.model.layers[1])
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        assert model(make_tokens(1, 9), **cache_argument(cache)).logits.isnan().any()
    mend()
