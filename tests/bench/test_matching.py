"""Peers by name, and how their settings are chosen to match bits."""

import pytest

from cache_support import make_model, make_tokens
from svdq_bench.quality import matching, quantized
from svdq_bench.quality.matching import Matched, candidates, matched, parse_peer, true_bits
from svdq_bench.quality.peers import FullCache, Kivi, KVQuant, PerChannel, ThinK, TurboQuant
from svdq_bench.quality.prefix import read_prefix
from svdq_bench.quality.quantized import TransformersQuantized, is_installed

TOKENS = 300
PEERS = [PerChannel(3, 5), Kivi(2, 32, 20, 4), Kivi(1, 64), ThinK(0.4, 6), ThinK(1e-3)]
FP8 = pytest.mark.skipif(not is_installed("fp8"), reason="transformers has no fp8 QuantizedCache")


@pytest.fixture(scope="module")
def prefix():
    return read_prefix(make_model("llama", "sdpa"), make_tokens(1, TOKENS))


@pytest.mark.parametrize("family", ["per-channel", "kivi", "think"])
@pytest.mark.parametrize("bits", [0.1, 2.7, 5, 40])
def test_matched_takes_the_nearest_true_bits(family, bits, prefix):
    found = matched(family, bits, prefix)
    distance = abs(found.memory_columns(found.compress(prefix))["all_in_bits"] - bits)
    for other in candidates(family, prefix):
        true = other.memory_columns(other.compress(prefix))["all_in_bits"]
        assert distance <= abs(true - bits)
    assert found.columns()["family"] == family


def test_matched_chooses_for_each_length(prefix):
    model = make_model("llama", "sdpa")
    method = Matched("think", PerChannel(4))
    short = read_prefix(model, make_tokens(1, 40))
    for context in (prefix, short):
        chosen = method.choose(context)
        step = 32 / 64  # of a channel; the nearest is within half of it
        wanted = true_bits(PerChannel(4), context)
        assert abs(true_bits(chosen, context) - wanted) <= step / 2
    assert method.choose(prefix) != method.choose(short)
    assert method.choose(prefix) is method.choose(prefix)
    assert method.label == "think, matched to per-channel 4-bit"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("per-channel:2", PerChannel(2, 4)),
        ("kivi:2", Kivi(2, 32, 0, 4)),
        ("kivi:4:64", Kivi(4, 64, 0, 4)),
        ("think:0.25", ThinK(0.25, 4)),
        ("per-channel:2:v4", PerChannel(2, 4, 4)),
        ("kivi:2:v2", Kivi(2, 32, 0, 4, 2)),
        ("kivi:2:64:128:v4", Kivi(2, 64, 128, 4, 4)),
        ("think:0.25:v4", ThinK(0.25, 4, 4)),
        ("kvquant:3", KVQuant(3, "pre", 4)),
        ("kvquant:2:post:v3", KVQuant(2, "post", 4, 3)),
        ("turboquant:4bit_nc", TurboQuant("4bit_nc")),
        ("turboquant:3bit_nc:0", TurboQuant("3bit_nc", 0)),
        ("turboquant:k8v4:1:4", TurboQuant("k8v4", 1, 4)),
        ("kivi", Matched("kivi", FullCache(), 4)),
        pytest.param("quantized:fp8", TransformersQuantized("fp8", 8), marks=FP8)
        if is_installed("fp8")
        else pytest.param("quantized:fp8", None, marks=FP8),
    ],
)
def test_peers_by_name(text, expected):
    assert parse_peer(text, FullCache(), 4) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("kv", "peers are per-channel, kivi, think, quantized, kvquant, turboquant, got 'kv'"),
        ("kivi:two", "peer 'kivi:two': invalid literal"),
        ("kivi:2:32:1:1", "expected per-channel:BITS"),
        ("kivi:v2", "expected per-channel:BITS"),
        ("per-channel:2:vier", "peer 'per-channel:2:vier': invalid literal"),
        ("per-channel:2:v9", "v_bits must be 1 .. 8, got 9"),
        ("kvquant:2:mid", "rope must be 'pre' or 'post'"),
        ("turboquant:2bit", "TurboQuant has k8v4"),
        ("turboquant", "can be matched to bits, 'turboquant' needs settings"),
        ("think:2", r"peer 'think:2': .* must be in \(0, 1\]"),
        ("per-channel:0", "bits must be 1 .. 8, got 0"),
        ("quantized:int", "backends quanto"),
    ],
)
def test_peers_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_peer(text, FullCache())
    with pytest.raises(ValueError, match="matched to an svdq preset, and there is none"):
        parse_peer("kivi", None)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(quantized, "is_installed", lambda backend: False)
    monkeypatch.setattr(matching, "is_installed", lambda backend: False)
    for make in (TransformersQuantized, lambda: Matched("quantized", FullCache())):
        with pytest.raises(
            ImportError, match="needs optimum.quanto.* 'pip install optimum-quanto'"
        ):
            make()
