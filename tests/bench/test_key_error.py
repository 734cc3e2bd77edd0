"""Errors of coded keys, the bound on them, and the command that measures both."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from cache_support import decoded, make_model, make_tokens
from model_support import make_text, save_model
from svdq_bench.cli import app
from svdq_bench.cli.table import cells, layer_cells
from svdq_bench.quality.key_error import (
    GaussianBound,
    evaluate_keys,
    key_methods,
    layer_errors,
    water_filling_error,
)
from svdq_bench.quality.matching import Matched
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.peers import Kivi, KVQuant, PerChannel, TurboQuant
from svdq_bench.quality.perplexity import Task
from svdq_bench.quality.prefix import read_prefix
from svdq_bench.quality.quantized import TransformersQuantized

TOKENS, SINKS = 330, 8  # 330: neither whole pages nor whole groups


@pytest.fixture(scope="module")
def prefix():
    """A context whose queries have far more energy in some channels than in others."""
    prefix = read_prefix(make_model("llama", "sdpa"), make_tokens(1, TOKENS))
    spread = 2.0 ** torch.linspace(-6, 6, 64)
    return dataclasses.replace(prefix, query_energy=[x * spread for x in prefix.query_energy])


def direct_share(keys, coded, start, stop, energy=None):
    """Error relative to the deviation from the mean, from the definition, in float64."""
    error = norm = 0.0
    for h in range(keys.shape[0]):
        own = keys[h, start:stop].double()
        weight = 1.0 if energy is None else energy[h].double()
        error += ((own - coded[h, start:stop].double()) ** 2 * weight).sum().item()
        norm += ((own - own.mean(dim=0)) ** 2 * weight).sum().item()
    return error / norm


@pytest.mark.parametrize(
    "method, stop",
    [
        (PerChannel(2, SINKS), TOKENS),
        (Kivi(2, 64, 0, SINKS), SINKS + 5 * 64),
        (KVQuant(2, "pre", SINKS), TOKENS),
        (TurboQuant("3bit_nc", 2, SINKS), TOKENS),  # keys are coded in layers that it skips, too
    ],
)
def test_errors_of_peers_are_those_of_what_they_decode(prefix, method, stop):
    for error in layer_errors(method, prefix):
        keys = prefix.cache.layers[error.layer].keys
        energy = prefix.query_energy[error.layer]
        coded = method.code_layer(prefix, error.layer)[0]
        share = direct_share(keys[0], coded, SINKS, stop)
        # Sums of the same float64 terms in another order.
        assert error.error / error.norm == pytest.approx(share, rel=1e-12)
        share = direct_share(keys[0], coded, SINKS, stop, energy)
        assert error.score_error / error.score_norm == pytest.approx(share, rel=1e-12)
        assert error.head_bits == (method.bits, method.bits)


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("keys, weighted", [("paper-2.0", None), ("2", False), ("2", True)])
def test_errors_of_caches_are_those_of_what_they_hold(prefix, rope, keys, weighted):
    method = CacheSettings(keys, "exact", rope, True, SINKS, 0, query_weighted=weighted)
    cache = method.compress(prefix)
    errors = list(layer_errors(method, prefix))
    assert [error.layer for error in errors] == [0, 1]
    for error in errors:
        layer = cache.layers[error.layer]
        held = decoded(layer)[0]
        if weighted:
            assert layer.tokens.fit.gain.unique().numel() > 1  # else they would prove nothing
        exact = prefix.cache.layers[error.layer].keys[0]
        share = direct_share(exact, held, SINKS, TOKENS // 64 * 64)
        assert error.error / error.norm == pytest.approx(share, rel=1e-12)
        assert 0 < share < 1
        assert sum(error.head_bits) / 2 == pytest.approx(layer.tokens.packed.layout.k_bits)


def test_more_bits_leave_less_error(prefix):
    for make in (PerChannel, lambda bits: CacheSettings(f"{bits}", "exact", residual_length=0)):
        two, four = (list(layer_errors(make(bits), prefix)) for bits in (2, 4))
        for few, many in zip(two, four, strict=True):
            assert many.error < few.error / 2


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_bound_is_below_every_code(prefix, rope):
    scopes, weightings = ("head",), (True, False)
    methods = key_methods(["2"], [], (rope,), scopes, weightings)
    *coded, bound = (list(layer_errors(method, prefix)) for method in methods)
    for errors in coded[1:]:
        for error, least in zip(errors, bound, strict=True):
            assert least.error / least.norm < error.error / error.norm


def test_bound_of_equal_and_of_few_variances():
    # Equal variances v: v / 4^b each. One variance among n takes all bits.
    assert water_filling_error(torch.full((6,), 3.0), 2) == pytest.approx(6 * 3 / 16)
    assert water_filling_error(torch.tensor([0.0, 5.0, 0.0, 0.0]), 1) == pytest.approx(5 / 4**4)
    assert water_filling_error(torch.tensor([1.0, 4.0]), 0) == pytest.approx(5)
    # Level 1/4: log2(16) / 2 = 2 bits for the first, the other stays below it.
    assert water_filling_error(torch.tensor([4.0, 0.2]), 1) == pytest.approx(0.25 + 0.2)


def test_bound_of_random_variances_satisfies_its_condition():
    variances = torch.rand(40).double() ** 4
    for bits in (0.1, 0.7, 3.0):
        error = water_filling_error(variances, bits)
        low, high = 0.0, 1.0  # the level that gives this error, by bisection
        for _ in range(100):
            middle = (low + high) / 2
            below = float(variances.clamp(max=middle).sum()) < error
            low, high = (middle, high) if below else (low, middle)
        rate = (variances / low).log2().clamp(min=0).sum() / 2 / len(variances)
        assert float(rate) == pytest.approx(bits, rel=1e-9)


def test_rows_pool_windows_and_compare_with_the_first():
    model, ids = make_model("llama", "sdpa"), make_tokens(1, 700)[0]
    task = Task((3, 320), TOKENS, 1)
    methods = [PerChannel(2, SINKS), CacheSettings("2", "exact", residual_length=0)]
    methods.append(GaussianBound(2))
    steps = []
    rows = evaluate_keys(model, ids, methods, task, steps.append)
    assert steps == 2 * [method.label for method in methods]
    found = [row for row in rows if row["benchmark"] == "key_error"]
    assert [(row["method"], row["layer"]) for row in found] == [
        (method.label, layer) for method in methods for layer in (0, 1)
    ]
    prefixes = [read_prefix(model, window[:, :TOKENS]) for window in task.windows(ids)]
    both = [[list(layer_errors(m, prefix)) for prefix in prefixes] for m in methods]
    for i, row in enumerate(found):
        one, other = (errors[i % 2] for errors in both[i // 2])
        share = (one.error + other.error) / (one.norm + other.norm)
        assert row["relative_error"] == pytest.approx(share, rel=1e-12)
        assert row["ratio"] == pytest.approx(found[i % 2]["relative_error"] / share, rel=1e-12)
    assert found[0]["ratio"] == found[0]["score_ratio"] == 1
    assert found[4]["score_error"] is None
    bits = [row for row in rows if row["benchmark"] == "bits"]
    assert {row["method"] for row in bits} == {methods[1].label}
    assert len(bits) == 4
    mean = sum(row["bits"] for row in bits) / 4
    assert mean == pytest.approx(sum(row["bits"] for row in found[2:4]) / 2)
    spectra = [row for row in rows if row["benchmark"] == "spectrum"]
    assert [(row["layer"], row["head"]) for row in spectra] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(x["variances"] == sorted(x["variances"], reverse=True) for x in spectra)


def test_methods_are_all_combinations():
    methods = key_methods(["paper-2.0", "4"], [Kivi(2)])
    labels = [method.label for method in methods]
    assert labels[:3] == ["per-channel 2-bit", "per-channel 4-bit", "KIVI 2-bit, groups of 32"]
    assert len(labels) == len(set(labels)) == 3 + 2 * (1 + 4) + 2 * 2
    assert {method.residual_length for method in methods[3:13]} == {0}
    for word, message in (("exact", "codes nothing"), ("lambda=0.1", "expected a preset")):
        with pytest.raises(ValueError, match=message):
            key_methods([word], [])


def test_methods_that_keep_their_keys_to_themselves_are_refused(prefix):
    method = TransformersQuantized("fp8", 8)
    with pytest.raises(ValueError, match="does not tell its keys"):
        list(layer_errors(method, prefix))


def test_contexts_too_short_to_pack_are_no_result():
    short = read_prefix(make_model("llama", "sdpa"), make_tokens(1, 100))
    with pytest.raises(ValueError, match="nothing was packed"):
        list(layer_errors(CacheSettings("2", "exact"), short))


def test_tables_summarize_over_layers():
    rows = []
    for method, ratios in (("base", (1, 1, 1)), ("other", (2, 10, 30))):
        for layer, ratio in enumerate(ratios):
            row = {"benchmark": "key_error", "layer": layer, "method": method, "bits": 2}
            row |= {"all_in_bits": None, "relative_error": 0.3 / ratio, "ratio": ratio}
            rows.append(row | {"score_ratio": None})
    rows.append({"benchmark": "spectrum", "layer": 0, "head": 0, "variances": [1.0]})
    headings, body = cells(rows)
    assert headings[0] == "keys"
    assert body[1][:3] == ["other", "2", "2"]
    assert body[1][-3:] == ["2.0", "10.0", "14.0"]
    assert layer_cells(rows) == (
        ["layer", "1", "2"],
        [["0", "1.0", "2.0"], ["1", "1.0", "10.0"], ["2", "1.0", "30.0"]],
    )


def test_command_writes_rows_and_prints_both_tables(tmp_path):
    save_model(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(make_text(500))
    arguments = [
        "eval", "keys", "--model", tmp_path / "tiny", "--text-file", tmp_path / "text.txt",
        "--prefill-tokens", 384, "--window-start", 10, "--preset", "paper-2.0", "--k-bits", 1.5,
        "--allocate-across", "head", "--no-weighted", "--rope", "pre", "--peer", "kivi:2:64",
        "--peer", "per-channel", "--json", tmp_path / "keys.json", "--html", tmp_path / "x.html",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "keys.json").read_text())
    labels = list(dict.fromkeys(r["method"] for r in rows if r["benchmark"] == "key_error"))
    assert labels[0] == "per-channel 2-bit"
    assert "svdq 1.5, pre-RoPE, clipped, per head, unweighted" in labels
    assert labels[-2:] == ["bound at 2 bits, pre-RoPE", "bound at 1.5 bits, pre-RoPE"]
    assert all(label in result.output for label in labels)
    assert "times smaller, by layer" in result.output
    assert "machine" in rows[0]
    assert "machine" not in rows[-1]
    assert "Decay of the keys" in (tmp_path / "x.html").read_text()


def test_a_matched_peer_is_what_it_becomes(prefix):
    matched = Matched("per-channel", PerChannel(4, SINKS), SINKS)
    assert matched.choose(prefix) == PerChannel(4, SINKS)
