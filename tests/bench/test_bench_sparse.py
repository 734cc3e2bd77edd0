"""The benchmark of sparse decoding: what is run and counted. No test depends on a time."""

import json

import pytest
import torch
from typer.testing import CliRunner

from svdq import ops
from svdq.config.sparsity import Sparsity
from svdq.store.attend import select_tokens
from svdq_bench.cli import app
from svdq_bench.quality.plots import to_svg
from svdq_bench.speed import timing
from svdq_bench.speed.shape import Shape
from svdq_bench.speed.sparse import (
    bench_sparse,
    exact_rows,
    key_reads,
    random_store,
    stage_times,
    step_case,
)

SCHEDULE = (4, 4, 2, 0, 0, 0, 0, 0)
SHAPE = Shape(
    num_qo_heads=4, num_kv_heads=2, head_dim=64, kv_len=900, sink_tokens=4, residual_length=32
)
PACKED = 900 - 32


@pytest.mark.parametrize("rope", ["pre", "post", "hybrid", "rotated-mean"])
def test_random_codes_make_keys_of_the_size_of_those_fitted(rope):
    store = random_store(SHAPE, SCHEDULE, rope, 4)
    assert (store.slots, store.pool.cache_seqlens.tolist()) == ([PACKED], [PACKED])
    at = (store.layout, store.pool.page_table[0], 0, PACKED)
    keys = store.decoded_keys(0, 0, PACKED)
    assert keys.isfinite().all()
    assert 0.3 < keys.std() < 3  # synthetic keys have deviations from 1 downwards, and means of 1
    assert not torch.equal(keys[:, 0], keys[:, 64])
    assert ops.unpack_values(store.pool.v_pages, *at).isfinite().all()


def test_long_stores_repeat_the_values_that_were_packed(monkeypatch):
    monkeypatch.setattr("svdq_bench.speed.sparse.FIT_TOKENS", 128)
    store = random_store(SHAPE, SCHEDULE, "post", 4)
    assert store.pool.k_pages.shape[0] == store.pool.v_pages.shape[0] == 14
    assert torch.equal(store.pool.v_pages[0], store.pool.v_pages[12])
    assert not torch.equal(store.pool.v_pages[0], store.pool.v_pages[1])
    assert not torch.equal(store.pool.k_pages[0], store.pool.k_pages[12])


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_steps_attend_to_their_budget(rope):
    store, rows = random_store(SHAPE, SCHEDULE, rope, 4), exact_rows(SHAPE)
    query = torch.randn(1, 4, 1, 64, dtype=torch.bfloat16)
    dense, most, few = (
        step_case(SHAPE, [store], rows, query, sparsity).call(0).float()
        for sparsity in (None, Sparsity(PACKED - 5, "latent", 8), Sparsity(8, "latent", 8))
    )
    assert dense.shape == (1, 4, 1, 64)
    # All but one token of little weight, then far from all; outputs are means of normal values.
    assert (most - dense).abs().max() < 0.1 * dense.abs().max()
    assert (few - dense).abs().max() > 0.3 * dense.abs().max()


def test_reads_are_counted():
    store, rows = random_store(SHAPE, SCHEDULE, "post", 4), exact_rows(SHAPE)
    sparse = key_reads(SHAPE, store, rows, Sparsity(1 / 32, "latent", 8))
    dense = key_reads(SHAPE, store, rows, None)
    candidates, heads, code = PACKED - 4, 2, 64 * 1.25 / 8
    assert sparse.attended == candidates // 32 == 27
    assert sparse.codes == 27 * heads * code
    assert dense.codes == candidates * heads * code
    assert sparse.full == dense.full == 900 * heads * 64 * 2
    assert sparse.exact == dense.exact == 36 * heads * 64 * 2
    assert sparse.scan == PACKED * heads * 8 * 4 / 8
    assert dense.scan == 0
    assert sparse.code_ratio > 400 > sparse.ratio > dense.ratio


def test_rows_compare_with_torch_and_with_all_tokens():
    steps = []
    rows = bench_sparse(
        SHAPE, SCHEDULE, (1 / 32, 100, 864, 2048), ropes=("post", "hybrid"),
        v_bits=4, channels=12, repeats=2, working_set_bytes=400_000, begin=steps.append,
    )  # fmt: skip
    cases = ("all tokens", "1/32", "100 tokens", "1/32, pairs", "100 tokens, pairs")
    names = [f"svdq {rope}, {case}" for rope in ("post", "hybrid") for case in cases]
    assert [row["case"] for row in rows] == ["torch enable_gqa", "torch folded", *names]
    assert len(steps) == 1 + timing.WARMUP + 2
    gqa, folded, *packed = rows
    best = min(gqa["ms"], folded["ms"])
    for row in rows:
        assert row["speedup_vs_enable_gqa"] == pytest.approx(gqa["ms"] / row["ms"])
        assert row["speedup_vs_torch_best"] == pytest.approx(best / row["ms"])
        assert row["kv_len"] == 900
    assert gqa["key_bytes"] == 900 * 2 * 64 * 2
    assert gqa["read_ratio"] == 1
    for dense, *sparse in (packed[:5], packed[5:]):
        assert dense["attended"] == 864
        assert not dense.keys() & {"budget", "select_ms", "speedup_vs_dense"}
        assert [row["attended"] for row in sparse] == [27, 100] * 2
        assert [row["alike"] for row in sparse] == [1, 1, 2, 2]
        for row in sparse:
            assert row["channels"] == 12
            assert row["speedup_vs_dense"] == pytest.approx(dense["ms"] / row["ms"])
            assert min(row["select_ms"], row["gather_ms"], row["attend_ms"]) > 0
            assert row["key_bytes"] < dense["key_bytes"]


def test_stages_are_those_of_the_operators(monkeypatch):
    """Every reading of the clock takes a second, and choosing 100, 300 and 200 besides."""
    clock, slow = [0.0], [200.0, 300.0, 100.0]

    def read():
        clock[0] += 1
        return clock[0]

    def choose(*arguments):
        clock[0] += slow.pop()
        return select_tokens(*arguments)

    monkeypatch.setattr("svdq_bench.speed.sparse.time.perf_counter", read)
    monkeypatch.setattr("svdq.store.attend.select_tokens", choose)
    store, query = random_store(SHAPE, SCHEDULE, "post", 4), torch.randn(1, 4, 1, 64)
    step = step_case(SHAPE, [store], exact_rows(SHAPE), query.bfloat16(), Sparsity(8, "latent", 8))
    stages = stage_times(step.call, 3)
    assert (stages["gather_ms"], stages["attend_ms"]) == (1000, 1000)
    assert 201_000 < stages["select_ms"] < 300_000
    assert slow == []


def test_command_writes_rows(tmp_path):
    arguments = [
        "bench", "sparse", "--rope", "post", "--kv-len", 300, "--kv-len", 500, "--num-qo-heads", 4,
        "--num-kv-heads", 2, "--head-dim", 64, "--repeats", 1, "--working-set", 1, "--budget",
        "1/16", "--json", tmp_path / "rows.json", "--markdown",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 5
    assert [row["kv_len"] for row in rows] == [300] * 5 + [500] * 5
    table = [line for line in result.output.splitlines() if line.startswith("|")]
    assert "| select | gather | attend |" in table[0]
    assert ">svdq post, 1/16<" in to_svg("sparse", rows)
    assert table[-1].startswith("| svdq post, 1/16, pairs | 500 | 26 |")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--budget", "0"), "a budget must be"),
        (("--sparse-channels", "6"), "sparse_channels must be"),
        (("--preset", "16"), "packs nothing"),
        (("--v-bits", "5"), "v_bits must be 4, 3 or 2"),
        (("--head-dim", "100"), "multiple of 16"),
    ],
)
def test_wrong_usage_is_said(options, message):
    result = CliRunner().invoke(app, ["bench", "sparse", *options])
    assert result.exit_code == 2
    assert message in result.output
