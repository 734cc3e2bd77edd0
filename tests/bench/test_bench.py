"""The benchmarks' bookkeeping: what is run, counted and compared. No test depends on a time."""

import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from cache_support import make_model, make_tokens
from svdq import _C
from svdq.config.settings import Settings
from svdq.layout import PageLayout
from svdq.store.packed import PackedStore
from svdq_bench.speed import gpu, machine, timing
from svdq_bench.speed.attend import Variants, bench_attend, packed_case, torch_case
from svdq_bench.speed.prefill import bench_prefill
from svdq_bench.speed.shape import Shape, synthetic_keys
from svdq_bench.speed.steps import bench_steps
from svdq_bench.speed.timing import Timing, time_interleaved

SCHEDULE = (4, 4, 2, 0, 0, 0, 0, 0)
SHAPE = Shape(
    num_qo_heads=4, num_kv_heads=2, head_dim=64, kv_len=300, sink_tokens=4, residual_length=32
)


@pytest.fixture(autouse=True)
def without_ggml(monkeypatch):
    """The peer is there or not: these tests count the cases that are always there."""
    monkeypatch.setattr("svdq_bench.speed.ggml.missing", lambda: "ggml is left out.")


def test_time_interleaved_takes_turns(monkeypatch):
    clock, calls, rounds = [0.0], [], []

    def case(name, seconds):
        def call(index):
            calls.append((index, name))
            clock[0] += seconds * (1 + index)

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    cases = {"a": case("a", 1.0), "b": case("b", 0.5)}
    timings = time_interleaved(cases, repeats=3, warmup=1, begin=rounds.append)
    assert calls == [(i, n) for i, order in enumerate(("ab", "ba", "ab", "ba")) for n in order]
    assert rounds == ["warm-up", "round 1", "round 2", "round 3"]
    assert timings["a"].seconds == (2.0, 3.0, 4.0)  # the first round does not count
    assert timings["b"].median_ms == 1500.0
    assert timings["b"].best_ms == 1000.0
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        time_interleaved(cases, repeats=0)


def test_timing_units():
    assert Timing((0.004, 0.002, 0.010)).median_ms == 4.0


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("v_bits", [2, 3, 4])
def test_packed_case_counts_what_it_reads(rope, v_bits):
    case = packed_case(SHAPE, SCHEDULE, rope, v_bits, torch.bfloat16)
    out = case.call(0)
    assert out.shape == (1, 4, 1, 64)
    assert out.isfinite().all()
    layout = PageLayout(64, ((0, 16, 8, 0),) * 2, rope, v_bits)
    pages = -(-(300 - 32) // 64)
    exact = 2 * 2 * (4 + 32) * 64 * 2
    basis = layout.rank * (64 * 2 + 4) + 2 * 64 * 4
    assert case.num_bytes == pages * (layout.k_page_bytes + layout.v_page_bytes) + basis + exact
    assert (case.k_bits, case.v_bits, case.copies) == (1.25, v_bits, 1)


def test_shapes_turn_by_their_base():
    shape = Shape(head_dim=64, rope_theta=1e4)
    assert shape.inv_freq.shape == (32,)
    assert shape.inv_freq[16] == pytest.approx(1e4**-0.5)


def test_attend_rows_of_one_dtype():
    variants = Variants(SCHEDULE, ["hybrid"], dtypes=[torch.float32])
    rows = bench_attend(SHAPE, variants, repeats=1, working_set_bytes=1)
    cases = ["torch enable_gqa float32", "torch folded float32", "svdq hybrid float32"]
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["ns_per_token"] == pytest.approx(row["ms"] * 1e6 / 300 / 2)


def test_copies_fill_the_working_set_and_take_turns():
    size = packed_case(SHAPE, SCHEDULE, "post", 4, torch.float32).num_bytes
    case = packed_case(SHAPE, SCHEDULE, "post", 4, torch.float32, 3 * size - 1)
    assert case.copies == 3
    assert torch.equal(case.call(0), case.call(1))
    layers = [tuple(torch.randn(2, 1, 2, 300, 64)) for _ in range(2)]
    case = torch_case(SHAPE, torch.float32, False, layers)
    assert not torch.equal(case.call(0), case.call(1))
    assert torch.equal(case.call(0), case.call(2))


def test_torch_formulations_agree():
    layers = [tuple(torch.randn(2, 1, 2, 300, 64))]
    outs = []
    for folded in (False, True):
        torch.manual_seed(3)  # the same query
        outs.append(torch_case(SHAPE, torch.float32, folded, layers).call(0).reshape(4, 64))
    # Softmax over 300 scores of float32: a few hundred roundings of numbers around 1.
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)


def test_synthetic_keys_are_compressible():
    keys = synthetic_keys(SHAPE)
    assert keys.shape == (2, 268, 64)
    singular = torch.linalg.svdvals(keys - keys.mean(1, keepdim=True))
    energy = singular.square().cumsum(1) / singular.square().sum(1, keepdim=True)
    assert (energy[:, 24] > 0.95).all()  # the channels that the paper's preset keeps


def test_attend_rows_compare_with_torch():
    steps = []
    variants = Variants(SCHEDULE)
    rows = bench_attend(SHAPE, variants, repeats=2, working_set_bytes=400_000, begin=steps.append)
    assert [row["case"] for row in rows] == [
        f"{case} {dtype}"
        for dtype in ("bfloat16", "float32")
        for case in ("torch enable_gqa", "torch folded", "svdq post", "svdq pre")
    ]
    assert len(steps) == 1 + timing.WARMUP + 2
    best = min(row["ms"] for row in rows if row["case"].startswith("torch"))
    for row in rows:
        dtype = row["case"].rsplit(" ", 1)[1]
        gqa = next(r["ms"] for r in rows if r["case"] == f"torch enable_gqa {dtype}")
        assert row["speedup_vs_torch_best"] == pytest.approx(best / row["ms"])
        assert row["speedup_vs_enable_gqa"] == pytest.approx(gqa / row["ms"])
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / (row["ms"] / 1e3) / 1e9)
        fraction = row["gbytes_per_s"] / row["read_gbytes_per_s"]
        assert row["bandwidth_fraction"] == pytest.approx(fraction)
        assert row["copies"] * row["bytes"] >= 400_000
        assert row["kv_len"] == 300
    full = {row["case"]: row["bytes"] for row in rows}
    assert full["torch folded bfloat16"] == 2 * 2 * 300 * 64 * 2
    assert full["torch folded float32"] == 2 * full["torch folded bfloat16"]


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"num_qo_heads": 5}, "num_qo_heads must be a multiple of num_kv_heads, got 5 and 2"),
        ({"kv_len": 36}, r"kv_len must exceed the exact tokens, 4 \+ 32, got 36"),
    ],
)
def test_shapes_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        Shape(**SHAPE.__dict__ | shape)


@pytest.mark.parametrize("family, layers", [("llama", 2), ("gemma3", 1)])
def test_prefill_rows_add_up(family, layers):
    steps = []
    model = make_model(family, "sdpa", torch.bfloat16)
    rows = bench_prefill(model, make_tokens(1, 200)[0], SCHEDULE, repeats=1, begin=steps.append)
    times = {row["case"]: row["ms"] for row in rows}
    stages = ["fit_basis", "fit_quantizer", "pack_keys", "pack_values"]
    assert list(times) == ["prefill", *stages, "fit and pack together"]
    parts = [times[stage] for stage in stages]
    assert min(parts) > 0
    assert times["fit and pack together"] == pytest.approx(sum(parts))
    for row in rows:
        assert row["fraction_of_prefill"] == pytest.approx(row["ms"] / times["prefill"])
        assert (row["tokens"], row["layers"]) == (200, layers)
    assert steps == ["prefill", "fit and pack"]


def test_machine_is_described(tmp_path):
    facts = machine.describe()
    assert facts["backend"] == _C.backend()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    for index, size in enumerate(("48K", "2048K", "1G", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert machine.last_level_cache_bytes(tmp_path) == 1 << 30
    assert machine.last_level_cache_bytes(tmp_path / "none") is None
    assert machine.package_version("no-such-distribution") is None


def test_batches_are_as_many_calls():
    shape = replace(SHAPE, batch=3)
    case = packed_case(shape, SCHEDULE, "pre", 4, torch.float32)
    assert case.call(0).shape == (3, 4, 1, 64)
    assert case.num_bytes == 3 * packed_case(SHAPE, SCHEDULE, "pre", 4, torch.float32).num_bytes
    rows = bench_attend(shape, Variants(SCHEDULE, ["post"]), repeats=1, working_set_bytes=1)
    for row in rows:
        assert row["batch"] == 3
        assert row["ns_per_token"] == pytest.approx(row["ms"] * 1e6 / 300 / 2 / 3)


@pytest.mark.parametrize("rope", ["post", "pre"])
def test_steps_that_pack_are_told_apart(rope, monkeypatch):
    pack, slowed = PackedStore.pack, 0.05

    def slow_pack(*args, **kwargs):
        time.sleep(slowed)
        pack(*args, **kwargs)

    monkeypatch.setattr(PackedStore, "pack", slow_pack)
    shape = replace(SHAPE, batch=2, kv_len=400)
    seen = []
    settings = Settings.of(schedule=SCHEDULE, v_bits=4, rope=rope)
    (row,) = bench_steps(shape, settings, torch.float32, seen.append)
    assert seen == ["packing", "steps"]
    assert row["boundary_ms"] > 1e3 * slowed * 2  # of both sequences
    assert row["boundary_ratio"] == row["boundary_ms"] / row["ordinary_ms"]
    assert (row["batch"], row["kv_len"], row["case"]) == (2, 400, f"{rope}, 2 sequences")


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_devices_that_are_not_there(device):
    if device == "cuda" and torch.cuda.is_available() and _C.BUILT_WITH_CUDA:
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no GPU|no CUDA kernels|must be one of"):
        bench_attend(SHAPE, Variants(SCHEDULE), device=device)


INTERPRETED = """
import torch
from svdq_bench.speed.split_kv import split_kv_attention
for batch, q_heads, heads, tokens, dim, splits in [
    (1, 4, 2, 300, 64, 3), (2, 8, 1, 129, 64, 2), (1, 40, 2, 64, 128, 1), (1, 2, 2, 5, 64, 0),
]:
    query = torch.randn(batch, q_heads, dim).half()
    keys, values = torch.randn(2, batch, heads, tokens, dim).half().unbind()
    out = split_kv_attention(query, keys, values, splits)
    exact = [x.double() for x in (query[:, :, None], keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, enable_gqa=True)
    # Probabilities and the result are rounded to half: 2^-11 each, of values up to about 5.
    assert (out - expected[:, :, 0]).abs().max() < 2 * 5 * 2**-11
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_baseline_is_attention():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=env, check=True)


def test_rows_from_a_gpu_name_it(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "a GPU")
    assert gpu.device_columns("cuda") == {"device": "a GPU"}
    assert gpu.device_columns("cpu") == {}
