"""The peers: what they do to keys, and the bytes they count."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from cache_support import make_model, make_tokens
from svdq_bench.quality import perplexity
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.matching import Matched, true_bits
from svdq_bench.quality.memory import full_cache_bytes
from svdq_bench.quality.peers import (
    FullCache,
    Kivi,
    KVQuant,
    PerChannel,
    ThinK,
    TurboQuant,
    round_to_range,
)
from svdq_bench.quality.perplexity import Task, evaluate_perplexity, mean_columns, predict
from svdq_bench.quality.prefix import RECORDING, fork, read_prefix
from svdq_bench.quality.quantized import TransformersQuantized, is_installed

TOKENS = 300
PEERS = [PerChannel(3, 5), Kivi(2, 32, 20, 4), Kivi(1, 64), ThinK(0.4, 6), ThinK(1e-3)]
FP8 = pytest.mark.skipif(not is_installed("fp8"), reason="transformers has no fp8 QuantizedCache")


@pytest.fixture(scope="module")
def prefix():
    return read_prefix(make_model("llama", "sdpa"), make_tokens(1, TOKENS))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_prefix_is_an_exact_prefill_with_query_energies(family):
    model, tokens = make_model(family, "sdpa"), make_tokens(1, 70)
    prefix = read_prefix(model, tokens)
    assert model.config._attn_implementation == "sdpa"
    queries = {}

    def note(module, query, *args, **kwargs):
        queries[module.layer_idx] = query * kwargs["scaling"]
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("test-noting", note)
    AttentionMaskInterface.register("test-noting", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    cache = DynamicCache(config=model.config)
    with attention(model, "test-noting"):
        first = perplexity.prefill(model, tokens, cache)
    assert torch.equal(prefix.first, first)
    assert prefix.num_tokens == 70
    for index, layer in enumerate(cache.layers):
        assert torch.equal(prefix.cache.layers[index].keys, layer.keys)
        energy = prefix.query_energy[index]
        if layer.is_sliding:
            assert energy is None
            assert index not in prefix.full_layers
            continue
        query = queries[index][0].double()  # [Hq, T, D]
        heads = layer.keys.shape[1]
        shared = query.shape[0] // heads
        for head in range(heads):
            of_head = query[head * shared : (head + 1) * shared]
            expected = of_head.square().mean(dim=(0, 1))
            # A mean of 140 to 280 positive float32 numbers: fewer roundings than numbers.
            torch.testing.assert_close(energy[head].double(), expected, rtol=280 * 2**-24, atol=0)


def test_prefix_refuses_what_is_no_context():
    model = make_model("llama", "sdpa")
    for shape in ((2, 5), (1, 0), (5,)):
        with pytest.raises(ValueError, match="expected a context"):
            read_prefix(model, torch.ones(shape, dtype=torch.long))
    with attention(model, RECORDING), pytest.raises(RuntimeError, match="for read_prefix alone"):
        model(make_tokens(1, 4))


@pytest.mark.parametrize("method", [FullCache(), *PEERS], ids=lambda m: m.label)
@torch.inference_mode()
def test_methods_and_what_follows_leave_the_prefix_alone(method, prefix):
    before = copy.deepcopy(prefix.cache)
    cache = method.compress(prefix)
    predict(make_model("llama", "sdpa"), make_tokens(1, 9), cache, prefix.first)
    assert cache.get_seq_length() == TOKENS + 8
    for old, layer, grown in zip(before.layers, prefix.cache.layers, cache.layers, strict=True):
        assert torch.equal(old.keys, layer.keys)
        assert torch.equal(old.values, layer.values)
        assert torch.equal(grown.values[:, :, :TOKENS], old.values)


def test_full_cache_goes_on_like_the_model(prefix):
    model, tokens = make_model("llama", "sdpa"), make_tokens(1, 9, seed=1)
    cache = copy.deepcopy(prefix.cache)
    with torch.inference_mode():
        expected = predict(model, tokens, cache, prefix.first)
        found = predict(model, tokens, FullCache().compress(prefix), prefix.first)
    assert torch.equal(found, expected)


def test_fork_refuses_keys_of_another_shape(prefix):
    with pytest.raises(ValueError, match="layer 1 has keys"):
        fork(prefix.cache, {1: prefix.cache.layers[1].keys[:, :, 1:]})


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounding_is_within_half_a_step(bits):
    x = 5 * torch.randn(2, 3, 40, 6) + 30 * torch.randn(6)
    found = round_to_range(x, bits)
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    # Half a step of the rounded scale; minimum and scale are each off by 2^-11 of themselves, which
    # moves a number by at most that share of the minimum and of the range.
    bound = step / 2 * (1 + 2**-11) + 2**-11 * (low.abs() + (high - low)) * (1 + 2**-10)
    assert ((found - x).abs() <= bound).all()
    for channel in found.flatten(0, 1).permute(0, 2, 1).flatten(0, 1):
        assert len(channel.unique()) <= 2**bits
    assert len(found[0, 0, :, 0].unique()) > min(2**bits, 20) / 2  # levels are used


def test_rounding_keeps_constant_channels_and_refuses_what_float16_cannot_hold():
    x = torch.full((1, 1, 10, 4), 0.5)
    assert torch.equal(round_to_range(x, 2), x)
    with pytest.raises(ValueError, match="range of float16"):
        round_to_range(x * 1e6, 2)


def packed_bytes(method, keys, energy):
    """Bytes of the arrays that an implementation would hold, built from one layer's keys."""
    keys = keys[0].numpy()
    heads, tokens, dim = keys.shape
    sinks = method.sink_tokens
    exact = [keys[:, :sinks]]
    if isinstance(method, ThinK):
        kept = [row.topk(max(round(method.kept * dim), 1)).indices for row in energy]
        parts = [keys[h, sinks:][:, channels] for h, channels in enumerate(kept)]
        masks = np.packbits(np.zeros((heads, dim), dtype=bool), axis=1)
        return sum(part.nbytes for part in [*parts, masks, *exact])
    size = tokens - sinks
    groups = 1
    if isinstance(method, Kivi):
        size, groups = method.group_size, (tokens - sinks - method.residual) // method.group_size
    coded = keys[:, sinks : sinks + groups * size]
    exact.append(keys[:, sinks + groups * size :])
    grouped = coded.reshape(heads, groups, size, dim)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    top = 2**method.bits - 1
    scales = np.stack([low, (high - low) / top]).astype(np.float16)
    codes = ((grouped - low[:, :, None]) / (high - low)[:, :, None] * top).round().astype(np.uint8)
    planes = (codes.ravel()[:, None] >> np.arange(method.bits)) & 1
    return sum(part.nbytes for part in [np.packbits(planes.ravel()), scales, *exact])


@pytest.mark.parametrize("method", PEERS, ids=lambda m: m.label)
def test_bytes_are_those_of_packed_arrays(method, prefix):
    layers = [prefix.cache.layers[i] for i in prefix.full_layers]
    expected = sum(
        packed_bytes(method, layer.keys, prefix.query_energy[i])
        for i, layer in zip(prefix.full_layers, layers, strict=True)
    )
    row = method.memory_columns(method.compress(prefix))
    numbers = sum(layer.keys.numel() for layer in layers)
    assert row["all_in_bits"] == 8 * expected / numbers
    values = sum(layer.values.nbytes for layer in layers)
    assert row["cache_bytes"] == expected + values
    assert row["cache_ratio"] == full_cache_bytes(prefix.cache) / row["cache_bytes"]
    if isinstance(method, ThinK):  # float32 numbers of some of 64 channels
        assert row["k_bits"] == 32 * max(round(method.kept * 64), 1) / 64
    else:
        assert row["k_bits"] == method.bits


def test_sliding_layers_stay_and_count_whole():
    prefix = read_prefix(make_model("gemma3", "sdpa"), make_tokens(1, TOKENS))
    method = PerChannel(2)
    cache = method.compress(prefix)
    sliding, full = cache.layers
    assert sliding.is_sliding
    assert torch.equal(sliding.keys, prefix.cache.layers[0].keys)
    assert not torch.equal(full.keys, prefix.cache.layers[1].keys)
    saved = full.keys.nbytes - method.memory(prefix).key_bytes
    row = method.memory_columns(cache)
    assert row["cache_bytes"] == full_cache_bytes(prefix.cache) - saved


def test_labels_tell_all_settings_apart():
    methods = [Kivi(2), Kivi(2, 64), Kivi(2, 32, 128), Kivi(2, v_bits=2), Kivi(2, 32, 128, 0, 2)]
    methods += [PerChannel(2), PerChannel(2, v_bits=4), ThinK(0.5), ThinK(0.5, v_bits=4)]
    methods += [KVQuant(2), KVQuant(2, "post"), KVQuant(2, v_bits=2), KVQuant(2, outliers=0)]
    methods += [TurboQuant("k8v4"), TurboQuant("k8v4", 0), TurboQuant("k8v4", 0, 8)]
    assert len({method.label for method in methods}) == len(methods)


def test_kivi_codes_whole_groups_and_nothing_else(prefix):
    method = Kivi(2, 32, 20, 4)
    keys, found = prefix.cache.layers[0].keys, method.compress(prefix).layers[0].keys
    end = 4 + (TOKENS - 24) // 32 * 32
    same = (found == keys).all(dim=-1)[0]  # [H, T]
    assert same[:, :4].all()
    assert same[:, end:].all()
    assert TOKENS - end >= 20
    assert not same[:, 4:end].any()
    changed = keys.clone()
    changed[:, :, 4 + 40] += 100  # a token of the second group
    moved = (method.code(changed, None) != found).any(dim=-1)[0]
    assert not moved[:, :36].any()
    assert moved[:, 36:68].any()
    assert not moved[:, 68:].any()


def test_think_keeps_channels_with_the_largest_product_of_norms():
    keys = torch.randn(1, 2, 50, 8) * torch.tensor([1, 1, 1, 1, 1, 1, 4, 4.0])
    energy = torch.ones(2, 8)
    energy[0, :2], energy[1, 6] = 100, 1e-4
    found = ThinK(0.5, 3).code(keys, energy)
    assert torch.equal(found[:, :, :3], keys[:, :, :3])
    norms = energy.sqrt() * keys[0, :, 3:].norm(dim=1)
    for head in range(2):
        kept = norms[head].argsort(descending=True)[:4].tolist()
        assert (head == 0) == ({0, 1, 6, 7} == set(kept))  # heads choose for themselves
        for channel in range(8):
            expected = keys[0, head, 3:, channel] * (channel in kept)
            assert torch.equal(found[0, head, 3:, channel], expected)


def test_nothing_coded_is_no_result(prefix):
    for method in (PerChannel(2, TOKENS), Kivi(2, 512), Kivi(2, 32, TOKENS), ThinK(0.5, TOKENS)):
        with pytest.raises(ValueError, match=f"nothing is coded of {TOKENS} tokens"):
            method.compress(prefix)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PerChannel(9), "bits must be 1 .. 8, got 9"),
        (lambda: Kivi(2, 0), "group_size must be at least 1"),
        (lambda: Kivi(2, residual=-1), "residual must be at least 0, got -1"),
        (lambda: ThinK(0), r"must be in \(0, 1\], got 0"),
        (lambda: ThinK(0.5, -2), "sink_tokens must be"),
        (lambda: TransformersQuantized("other"), "backends quanto, hqq, fp8, got 'other'"),
        (lambda: TransformersQuantized("quanto", 3), r"quanto takes \(2, 4\) bits, got 3"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@FP8
def test_quantized_cache_counts_its_own_tensors(prefix):
    method = TransformersQuantized("fp8", 8)
    cache = method.compress(prefix)
    row = method.memory_columns(cache)
    numbers = sum(layer.keys.numel() for layer in prefix.cache.layers)
    scales = 4 * len(cache.layers)
    assert row["all_in_bits"] == 8 * (numbers + scales) / numbers
    assert row["cache_bytes"] == 2 * (numbers + scales)
    assert row["cache_ratio"] == pytest.approx(4, rel=1e-3)
    assert row["times_smaller_bf16"] == row["cache_ratio"] / 2  # nothing is exact
    layer, exact = cache.layers[0], prefix.cache.layers[0].keys
    found = layer._dequantize(layer._quantized_keys)
    # Three stored bits of mantissa; below 2^-6 of the scale, 448 steps of 2^-9 to the largest.
    bound = exact.abs() * 2**-4 + exact.abs().max() / 448 * 2**-10
    assert ((found - exact).abs() <= bound * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match="backend 'fp8': .*sliding_attention"):
        method.compress(read_prefix(make_model("gemma3", "sdpa"), make_tokens(1, 60)))


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantized_cache_of_other_packages(backend, prefix):
    if not is_installed(backend):
        pytest.skip(f"the package of QuantizedCache's {backend} is not installed")
    method = TransformersQuantized(backend, 4, 64)
    cache = method.compress(prefix)
    # Two float32 numbers for 64 codes.
    assert method.memory_columns(cache)["all_in_bits"] == 4 + 2 * 32 / 64
    layer, exact = cache.layers[0], prefix.cache.layers[0].keys
    found = layer._dequantize(layer._quantized_keys)
    groups = exact.view(*exact.shape[:-1], 1, 64)
    step = (groups.amax(-1) - groups.amin(-1)).clamp_min(groups.abs().amax(-1)) / 15
    assert ((found - exact).abs() <= 1.5 * step).all()  # rounding, and a rounded zero point


def test_perplexity_compares_methods_on_one_prefill(monkeypatch):
    model, token_ids = make_model("llama", "sdpa"), make_tokens(1, 500)[0]
    contexts = []

    def read(model, context):
        contexts.append(context)
        return read_prefix(model, context)

    monkeypatch.setattr(perplexity, "read_prefix", read)
    methods = [PerChannel(8), PerChannel(2), ThinK(1.0), Matched("kivi", PerChannel(4))]
    task = Task((0, 90), 300, 40)
    with torch.inference_mode():
        rows = evaluate_perplexity(model, token_ids, methods, task)
    assert [context.shape[1] for context in contexts] == [300, 300]
    full, fine, coarse, all_channels, kivi = rows
    assert (full["method"], full["kl"], full["cache_ratio"]) == ("full cache", 0, 1)
    # Steps are 85 times as large; KL is quadratic in them.
    assert 0 < fine["kl"] < coarse["kl"] / 100
    assert all_channels["kl"] == 0
    assert all_channels["perplexity"] == full["perplexity"]
    assert kivi["matched"] == "kivi, matched to per-channel 4-bit"
    assert kivi["method"].startswith("KIVI")
    assert abs(kivi["all_in_bits"] - true_bits(PerChannel(4), read_prefix(model, contexts[0]))) < 2


def test_means_over_contexts():
    rows = [{"a": 1, "b": 2.0, "c": {"x": 1}}, {"a": 1, "b": 4.0, "c": {"x": 2}}]
    assert mean_columns(rows) == {"a": 1, "b": 3.0, "c": {"x": 1}}
    assert not math.isnan(mean_columns(rows[:1])["b"])
