"""Peers that code values too: errors, and bytes of whole caches."""

import numpy as np
import pytest
import torch

from cache_support import make_model, make_tokens
from svdq_bench.quality.memory import bf16_bytes, full_cache_bytes
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.peers import Kivi, PerChannel, ThinK, TokenRanges
from svdq_bench.quality.prefix import read_prefix

TOKENS = 300
PEERS = [
    PerChannel(3, 5, 2),
    Kivi(2, 32, 20, 4, 4),
    Kivi(1, 64, v_bits=3),
    ThinK(0.4, 6, 4),
]


@pytest.fixture(scope="module")
def prefix():
    return read_prefix(make_model("llama", "sdpa"), make_tokens(1, TOKENS))


def token_codes(values, ranges):
    """Codes, scales and minima of one layer's values [H, n, D], by the definition."""
    heads, tokens, dim = values.shape
    size = min(ranges.group_size or dim, dim)
    grouped = values.reshape(heads, tokens, dim // size, size)
    low, high = grouped.min(axis=3), grouped.max(axis=3)
    top = 2**ranges.bits - 1
    codes = (grouped - low[..., None]) / (high - low)[..., None] * top
    pairs = np.stack([low, (high - low) / top]).astype(np.float16)
    return codes.round().astype(np.uint8), pairs


def packed_bytes(values, ranges):
    """Bytes of the arrays that an implementation would hold of one layer's values [1, H, T, D]."""
    values = values[0].numpy()
    start, stop = ranges.sink_tokens, values.shape[1] - ranges.residual
    codes, pairs = token_codes(values[:, start:stop], ranges)
    planes = (codes.ravel()[:, None] >> np.arange(ranges.bits)) & 1
    exact = [values[:, :start], values[:, stop:]]
    return sum(part.nbytes for part in [np.packbits(planes.ravel()), pairs, *exact])


@pytest.mark.parametrize("method", PEERS, ids=lambda m: m.label)
def test_bytes_of_the_cache_are_those_of_packed_arrays(method, prefix):
    layers = [prefix.cache.layers[i] for i in prefix.full_layers]
    row = method.memory_columns(method.compress(prefix))
    expected = sum(packed_bytes(layer.values, method.values) for layer in layers)
    # Keys as in test_peers.py, which builds their arrays.
    expected += round(row["all_in_bits"] * sum(layer.keys.numel() for layer in layers) / 8)
    assert row["cache_bytes"] == expected
    assert row["cache_ratio"] == full_cache_bytes(prefix.cache) / expected
    assert method.columns()["v_bits"] == method.v_bits
    assert method.label.endswith(f", {method.v_bits}-bit values")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", [*PEERS, PerChannel(2)], ids=lambda m: m.label)
def test_ratio_to_bfloat16_is_that_of_a_bfloat16_model(family, method):
    wide, narrow = (
        method.memory_columns(
            method.compress(read_prefix(make_model(family, "sdpa", dtype), make_tokens(1, TOKENS)))
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide["times_smaller_bf16"] == narrow["times_smaller_bf16"] == narrow["cache_ratio"]
    assert wide["cache_bytes"] > narrow["cache_bytes"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        CacheSettings("paper-1.25", "exact", residual_length=70),
        CacheSettings("paper-2.25", 4, residual_length=0, outlier_fraction=0.01),
    ],
    ids=lambda settings: settings.label,
)
def test_svdq_in_bfloat16_is_what_a_bfloat16_model_holds(family, settings):
    wide, narrow = (
        settings.compress(read_prefix(make_model(family, "sdpa", dtype), make_tokens(1, 600)))
        for dtype in (torch.float32, torch.bfloat16)
    )
    report = narrow.memory_report()
    full, held = bf16_bytes(wide)
    assert (full, held) == bf16_bytes(narrow) == (report.full_bytes, report.total_bytes)
    assert held < wide.memory_report().total_bytes
    assert settings.memory_columns(wide)["times_smaller_bf16"] == full / held


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 100])
def test_values_are_within_half_a_step_of_their_group(bits, group_size):
    values = torch.randn(1, 2, 30, 64) * torch.rand(1, 2, 30, 1) + 3
    ranges = TokenRanges(bits, group_size, 4, 5)
    found = ranges.code(values)
    assert torch.equal(found[:, :, :4], values[:, :, :4])
    assert torch.equal(found[:, :, 25:], values[:, :, 25:])
    grouped = values[:, :, 4:25].unflatten(-1, (-1, 16 if group_size == 16 else 64))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    # Half a step of the rounded scale; minimum and scale are each off by 2^-11 of themselves.
    bound = step / 2 * (1 + 2**-11) + 2**-11 * (low.abs() + (high - low)) * (1 + 2**-10)
    error = (found[:, :, 4:25].view_as(grouped) - grouped).abs()
    assert (error <= bound).all()
    assert (error > 0).any()


def test_values_of_a_group_say_nothing_of_others():
    values = torch.randn(1, 2, 10, 64)
    changed = values.clone()
    changed[0, 1, 7, 40] += 100
    ranges = TokenRanges(2, 32)
    moved = ranges.code(values) != ranges.code(changed)
    assert moved[0, 1, 7, 32:].any()
    moved[0, 1, 7, 32:] = False
    assert not moved.any()


def test_value_settings_out_of_range():
    for make in (PerChannel, Kivi, ThinK):
        with pytest.raises(ValueError, match="v_bits must be 1 .. 8, got 9"):
            make(1, v_bits=9)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        TokenRanges(2, 0)
    with pytest.raises(ValueError, match="64 channels have no whole groups of 48"):
        TokenRanges(2, 48).num_bytes((1, 10, 64), 4)
