"""The memory report is what is allocated, part by part, and full keys and values are not kept."""

import weakref

import pytest
import torch
from transformers import DynamicCache

from cache_support import CONFIGS, FINE, Driver, make_model, make_tokens
from svdq import SVDqCache, cache_argument
from svdq.cache.layer import SVDqLayer


def assert_report_is_true(cache):
    report = cache.memory_report()
    assert report.total_bytes == cache.allocated_bytes()
    assert all(size >= 0 for size in report.parts.values())
    return report


@pytest.mark.parametrize(
    "settings",
    [
        {},
        FINE,
        {"preset": "exact"},
        {"rope": "post", "v_bits": 2},
        {"residual_length": 0},
        {"k_bits": 0.7},
        {"k_bits": 0.7, "v_bits": 2.5},
        {"k_bits": 1.25, "allocate_across": "head", "rope": "post"},
        {"lambda_": 0.1, "query_weighted": False},
        {"rope": "hybrid", "outlier_fraction": 0.01},
        {"rope": "rotated-mean", "k_bits": 0.7},
    ],
    ids=[
        *("default", "fine", "exact", "post", "no window", "allocated", "allocated values"),
        *("per head", "price"),
        *("hybrid", "rotated mean"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_report_equals_what_is_allocated(settings, dtype):
    driver = Driver(2, dtype, **settings)
    assert assert_report_is_true(driver.cache).total_bytes == 0
    steps = [
        lambda: driver.feed(100),
        lambda: driver.feed(300),
        lambda: [driver.feed(1) for _ in range(70)],
        lambda: driver.feed(200),
        lambda: driver.cache.crop(-250),
        lambda: driver.cache.reorder_cache(torch.tensor([1, 1])),
        lambda: driver.feed(40),
        lambda: driver.cache.batch_select_indices(torch.tensor([0])),
        driver.cache.reset,
    ]
    for step in steps:
        step()
        report = assert_report_is_true(driver.cache)
    assert report.total_bytes == 0


def test_parts_are_what_the_format_says():
    """2 sequences, 2 KV heads, head_dim 64, 400 tokens: 5 pages each; 8 sinks, a window of 80."""
    driver = Driver(2, torch.bfloat16, preset="paper-1.25", query_weighted=True)
    driver.feed(400)
    report = driver.cache.memory_report()
    packed, coded = 2 * 5 * 64 * 2, 3 * 8  # numbers per channel; of 64 channels 24 have bits
    assert report.key_codes == packed * (8 * 4 + 8 * 4 + 8 * 2) / 8
    assert report.key_scale == 2 * 2 * coded * 4
    assert report.key_basis == 2 * 2 * coded * 64 * 2
    assert report.key_mean == 2 * 2 * 64 * 4
    assert report.key_gain == 2 * 2 * 64 * (2 + 4) + 2 * 4  # gain, energies, tokens seen
    assert report.value_codes == packed * 64 * 4 / 8
    assert report.value_scales == packed  # a byte for each token of a head
    assert report.sink_keys == report.sink_values == 2 * 8 * 2 * 64 * 2
    assert report.window_keys == report.window_values == 2 * 80 * 2 * 64 * 2
    assert report.page_tables == 2 * 5 * 4
    assert report.tokens == 800
    assert report.full_bytes == 2 * 800 * 2 * 64 * 2
    assert report.code_bits == 1.25
    keys = report.key_codes + report.key_scale + report.key_basis + report.key_mean
    keys += report.key_gain + report.sink_keys + report.window_keys + report.page_tables
    assert report.key_bits == 8 * keys / (800 * 2 * 64)
    assert report.ratio == report.full_bytes / report.total_bytes
    assert "1.25 in codes" in str(report) and "window keys" in str(report)


def test_pages_that_copies_share_count_once():
    driver = Driver(1)
    driver.feed(2048)
    before = driver.cache.memory_report()
    driver.cache.batch_repeat_interleave(4)
    after = assert_report_is_true(driver.cache)
    assert after.key_codes == before.key_codes
    assert after.window_keys == 4 * before.window_keys
    assert after.tokens == 4 * before.tokens


def test_sliding_layers_are_in_the_report():
    model = make_model("gemma3")
    cache = SVDqCache(model.config, **FINE)
    with torch.inference_mode():
        for length in (300, 1, 20):
            model(make_tokens(1, length), **cache_argument(cache))
            report = assert_report_is_true(cache)
    sliding = cache.layers[0]
    assert report.other_layers >= sliding.keys.nbytes + sliding.values.nbytes
    assert report.tokens == 321


def test_long_prompt_is_an_order_smaller():
    """Of a bfloat16 model at 8,192 tokens: 4-bit values and all overheads included."""
    driver = Driver(1, torch.bfloat16, preset="paper-1.25", rope="post")
    driver.feed(8192)
    report = assert_report_is_true(driver.cache)
    assert report.ratio > 5
    assert report.key_bits < 1.25 + 0.6


def test_no_layer_keeps_its_prompt():
    """While one layer of a model prefills, those before it hold packed keys alone."""
    model = make_model("llama")
    cache = SVDqCache(model.config, preset="paper-1.25")
    held, given = [], []
    update = SVDqLayer.update

    def watched_update(layer, keys, values, *args, **kwargs):
        given.extend(weakref.ref(x) for x in (keys, values))
        return update(layer, keys, values, *args, **kwargs)

    hooks = [
        block.register_forward_hook(
            lambda *_: held.append((cache.allocated_bytes(), [ref() is None for ref in given]))
        )
        for block in model.model.layers
    ]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(SVDqLayer, "update", watched_update)
        model(make_tokens(1, 2048), **cache_argument(cache))
    for hook in hooks:
        hook.remove()
    layer_bytes = held[0][0]
    full_layer = 2 * 2048 * 2 * 64 * 4
    assert layer_bytes < full_layer / 5
    assert held[1][0] <= 2 * layer_bytes
    assert all(all(freed) for _, freed in held)


def test_memory_is_near_a_full_cache_s_where_nothing_is_packed():
    """A short prompt pays for growing room alone: a quarter at most, and a step of rows."""
    driver = Driver(preset="exact")
    driver.feed(1000)
    for _ in range(200):
        driver.feed(1)
    report = assert_report_is_true(driver.cache)
    assert report.total_bytes <= 1.25 * report.full_bytes + 16 * 2 * 2 * 64 * 4 + 64


def test_full_bytes_are_a_dynamic_cache_s():
    model, tokens = make_model("gemma3"), make_tokens(1, 300)
    full, cache = DynamicCache(config=CONFIGS["gemma3"]), SVDqCache(CONFIGS["gemma3"])
    with torch.inference_mode():
        model(tokens, **cache_argument(full))
        model(tokens, **cache_argument(cache))
    extra = 8  # the sliding layer's own length, a tensor in transformers 5
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    assert expected <= cache.memory_report().full_bytes <= expected + extra
