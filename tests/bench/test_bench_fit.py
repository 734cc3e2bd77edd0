"""The benchmark of fitting and packing: what is run, counted and compared, and what it may add."""

import json
import subprocess
import sys

import pytest
import torch

from support import assert_same
from svdq_bench.speed import timing
from svdq_bench.speed.fit import STAGES, bench_fit, compress, make_prompt, torch_calls
from svdq_bench.speed.memory import PROC, peak_growth, resident_bytes
from svdq_bench.speed.models import MODELS, ModelShape, model_shape

SCHEDULE = (4, 4, 2, 0, 0, 0, 0, 0)
SMALL = ModelShape(128, 256, 2, 4, 2, 64)

linux = pytest.mark.skipif(not (PROC / "clear_refs").exists(), reason="memory is read from /proc")


def test_operations_of_a_prefill():
    llama = model_shape("llama-3.1-8b")
    # 6.98e9 of its 8.03e9 parameters are in the layers; the rest are embeddings and head.
    assert llama.num_layers * llama.layer_parameters == 6_979_321_856
    # Causal attention: q k^T and p v over half of the pairs, 2 operations a product.
    attention = 2 * 2 * 32 * 128 * 1000**2 / 2
    assert llama.prefill_flops(1000) == 2 * llama.layer_parameters * 1000 + attention
    with pytest.raises(ValueError, match="one of llama-3.1-8b, .*, got 'gpt'"):
        model_shape("gpt")
    assert all(shape.num_qo_heads % shape.num_kv_heads == 0 for shape in MODELS.values())


@linux
def test_rows_compare_with_torch():
    steps = []
    ropes = ["post", "hybrid"]
    rows = bench_fit(SMALL, 300, SCHEDULE, ropes, repeats=2, gemm_size=64, begin=steps.append)
    by_case = {row["case"]: row for row in rows}
    assert len(by_case) == len(rows)
    assert len(steps) == 1 + timing.WARMUP + 2 + len(ropes)
    svd = by_case["torch.linalg.svd float32"]
    products = {n: row for n, row in by_case.items() if n.startswith("torch.matmul")}
    for row in products.values():
        assert row["gflops"] == pytest.approx(2 * 64**3 / (row["ms"] / 1e3) / 1e9)
    rate = max(row["gflops"] for row in products.values())
    layer_ms = SMALL.prefill_flops(300) / (rate * 1e9) * 1e3
    for rope in ropes:
        stages = [by_case[f"{name}, {rope}"] for name in STAGES]
        whole, cache = (
            by_case[f"fit and pack together, {rope}"],
            by_case[f"as the cache does, {rope}"],
        )
        assert min(row["best_ms"] for row in stages) > 0
        assert sum(row["best_ms"] for row in stages) <= whole["best_ms"] * 1.0001
        for row in (*stages, whole, cache):
            assert row["speedup_vs_svd"] == pytest.approx(svd["ms"] / row["ms"])
            assert row["keys_gbytes_per_s"] == pytest.approx(2 * 300 * 64 * 2 / row["ms"] / 1e6)
            assert row["fraction_of_prefill"] == pytest.approx(row["ms"] / layer_ms)
            read = by_case["read the keys"]["ms"]
            assert row["bandwidth_fraction"] == pytest.approx(read / row["ms"])
        assert cache["peak_fraction"] >= 0
        assert "speedup_vs_svd" not in by_case[f"append 64 tokens, {rope}"]
    assert (svd["kv_len"], svd["num_kv_heads"], svd["head_dim"]) == (300, 2, 64)


def test_torch_decomposes_the_same_keys():
    keys = torch.randn(2, 300, 64).bfloat16()
    by_svd, by_covariance = (call(0) for call in torch_calls(keys).values())
    squares = by_svd.S.square().flip(1)
    torch.testing.assert_close(by_covariance.eigenvalues, squares, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rope", ["post", "pre", "hybrid"])
def test_what_is_timed_packs_the_prompt(rope):
    torch.manual_seed(4)
    keys, values = torch.randn(2, 2, 300, 64).bfloat16().unbind()
    prompt = make_prompt(keys, values, SCHEDULE, rope, 4)
    store = compress(prompt)
    assert store.slots == [300]
    for name, coded in store.codec.tensors().items():
        assert_same(coded, getattr(prompt.store.codec, name))


@linux
def test_peak_growth_counts_what_is_freed_again():
    size = 50_000_000

    def call():
        big = torch.ones(size, dtype=torch.uint8)
        return big[:1000].clone()

    assert 0.9 * size < peak_growth(call) < 1.3 * size
    assert peak_growth(lambda: None) < 0.1 * size
    with pytest.raises(OSError, match="has no VmNone"):
        resident_bytes("VmNone")


# Compressing a layer, in a process of its own: what was freed before hides growth.
PEAKS = """
import json, sys, torch
from transformers import LlamaConfig
from svdq import SVDqCache, sample_positions
from svdq_bench.speed.shape import Shape, synthetic_keys
from svdq_bench.speed.memory import peak_growth

heads, dim, tokens = 4, 64, 32768
config = LlamaConfig(hidden_size=512, num_hidden_layers=1, num_attention_heads=8,
                     num_key_value_heads=heads, head_dim=dim, max_position_embeddings=tokens)
keys = synthetic_keys(Shape(heads, heads, dim, tokens + 1, 0, 1)).bfloat16()[None]
values = torch.randn(keys.shape, dtype=torch.bfloat16)
energy = torch.rand(heads, dim) + 0.5
peaks = {}
with torch.inference_mode():
    for name, settings in json.loads(sys.argv[1]).items():
        for tokens in (2000, 32768):  # first a little, so that libraries have what they keep
            cache = SVDqCache(config, **settings)
            some = keys[:, :, :tokens].contiguous(), values[:, :, :tokens].contiguous()
            queries = torch.randn(2 * heads, len(sample_positions(tokens)), dim) / 8
            growth = peak_growth(lambda: cache.layers[0].prefill_from(*some, energy, queries))
            full = some[0].nbytes + some[1].nbytes
            assert cache.layers[0].tokens.any_packed
        peaks[name] = growth / full, cache.allocated_bytes() / full
print(json.dumps(peaks))
"""

CACHES = {
    "default": {},
    "pre": {"preset": "paper-1.25", "query_weighted": True},
    "post": {"rope": "post"},
    "unweighted": {"preset": "paper-1.25"},
    "hybrid": {"rope": "hybrid"},
    "layer": {"k_bits": 1.25, "allocate_across": "layer"},
    "min-max": {"clip": False},
}


@linux
def test_compressing_a_layer_takes_less_than_its_full_cache():
    """All it adds to the keys and values that the model holds: pages, samples and scratch."""
    call = [sys.executable, "-c", PEAKS, json.dumps(CACHES)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout)
    assert list(peaks) == list(CACHES)
    for name, (growth, packed) in peaks.items():
        assert growth <= 1.1, name
        assert packed < 0.25, name
    growth, packed = peaks["unweighted"]
    assert growth - packed <= 0.1  # nothing that grows with the prompt is copied
