"""The peer from llama.cpp: it computes attention, and says why where it cannot."""

import pytest
import torch

from svdq_bench.speed import ggml

# Steps of a type as a share of a block's largest number, and what halves lose: by how much an
# output, a mean of values around 1 with scores around 1, may be off.
TOLERANCE = {"f16": 0.01, "q8_0": 0.03, "q4_0": 0.3}


def test_absence_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv(ggml.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    assert "llama-cpp-python is not installed" in ggml.missing()
    monkeypatch.setenv(ggml.LIBRARY_VARIABLE, str(tmp_path))
    assert ggml.missing() == f"ggml is left out: {tmp_path} has no libggml-base.so."
    with pytest.raises(RuntimeError, match="libggml-base"):
        ggml.FlashAttention(torch.zeros(2, 64), *torch.zeros(2, 1, 8, 64), "f16")


@pytest.mark.skipif(ggml.missing() is not None, reason=str(ggml.missing()))
@pytest.mark.parametrize("cache_type", ggml.CACHE_TYPES)
def test_it_attends(cache_type):
    query = torch.randn(4, 64)
    keys, values = torch.randn(2, 2, 256, 64)
    attention = ggml.FlashAttention(query, keys, values, cache_type)
    attention.run()
    grouped = query.double().view(2, 2, 64)
    scores = (grouped @ keys.double().mT / 8).softmax(-1)
    expected = (scores @ values.double()).view(4, 64)
    assert (attention.output() - expected).abs().max() < TOLERANCE[cache_type]
    bits = ggml.CACHE_TYPES[cache_type][1]
    assert attention.num_bytes == 2 * 2 * 256 * 64 * bits / 8


@pytest.mark.skipif(ggml.missing() is not None, reason=str(ggml.missing()))
def test_calls_rotate_among_copies():
    query, (keys, values) = torch.randn(4, 64), torch.randn(2, 2, 64, 64)
    call, num_bytes, copies = ggml.ggml_call(query, keys, values, "q8_0", 100_000)
    assert copies == -(-100_000 // num_bytes)
    for index in range(2 * copies):
        call(index)
