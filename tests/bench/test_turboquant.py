"""TurboQuant as vLLM ships it: levels, rotation, errors and bytes."""

import math

import numpy as np
import pytest
import torch

from cache_support import CONFIGS, make_model, make_tokens
from svdq_bench.quality.peers import TurboQuant
from svdq_bench.quality.peers.turboquant import PRESETS, hadamard, normal_levels
from svdq_bench.quality.prefix import read_prefix

TOKENS = 90


@pytest.fixture(scope="module")
def prefix():
    return read_prefix(make_model("llama", "sdpa"), make_tokens(1, TOKENS))


@pytest.mark.parametrize("bits, error", [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_levels_have_the_errors_of_max(bits, error):
    """Max (1960), table 1, to its four digits; by integration on a grid of its own."""
    levels = normal_levels(bits).numpy()
    x = np.linspace(-9, 9, 200_001)
    nearest = np.abs(x[:, None] - levels).min(axis=1)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    found = np.trapezoid(nearest**2 * density, x)
    assert found == pytest.approx(error, rel=6e-4)
    assert np.allclose(levels, -levels[::-1], atol=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 64, 128])
def test_rotation_is_orthonormal_and_its_own_inverse(dim):
    matrix = hadamard(dim)
    # A sum of dim products of numbers that float32 holds to 2^-24.
    bound = dim * 2**-23
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim), rtol=0, atol=bound)
    assert torch.equal(matrix, matrix.mT)
    with pytest.raises(ValueError, match="power of 2, got 80"):
        hadamard(80)


@pytest.mark.parametrize("preset, distortion", [("3bit_nc", 0.03454), ("4bit_nc", 0.009497)])
def test_keys_have_the_error_of_the_levels_and_their_own_norm(preset, distortion):
    keys = 3 * torch.randn(1, 4, 2000, 128)
    found = TurboQuant(preset).code(keys, None)
    # float16 holds a norm to 2^-11; the rest is float32.
    norms = keys.norm(dim=-1)
    assert ((found.norm(dim=-1) - norms).abs() <= norms * 2**-11 * 1.01).all()
    # On the sphere numbers are a little less spread than a normal variable, and the correction
    # lowers the error of a level vector that is too short: a few hundredths.
    error = (found - keys).square().sum() / keys.square().sum()
    assert error.item() == pytest.approx(distortion, rel=0.06)


def test_keys_are_rounded_to_the_levels_of_their_rotation():
    keys = torch.randn(1, 2, 50, 64) * torch.tensor([1.0, 20.0])[:, None, None]
    found = TurboQuant("3bit_nc", sink_tokens=3).code(keys, None)
    assert torch.equal(found[:, :, :3], keys[:, :, :3])
    levels = normal_levels(3).numpy() / 8
    rotation = hadamard(64).double().numpy()
    for head in range(2):
        for token in range(3, 50):
            key = keys[0, head, token].double().numpy()
            unit = key / np.linalg.norm(key) @ rotation
            vector = levels[np.abs(unit[:, None] - levels).argmin(axis=1)]
            vector *= float(np.float16(np.linalg.norm(key))) / np.linalg.norm(vector)
            expected = torch.tensor(vector @ rotation)
            torch.testing.assert_close(
                found[0, head, token].double(), expected, rtol=1e-4, atol=1e-4
            )


def test_eight_bit_keys_are_float8():
    keys = torch.randn(1, 2, 50, 80) * 10  # no rotation, so any head_dim
    keys[0, 0, 0, 0] = 1000
    found = TurboQuant("k8v4").code(keys, None)
    assert found[0, 0, 0, 0] == 448
    keys[0, 0, 0, 0] = 448
    # Three stored bits of mantissa; subnormal steps of 2^-9.
    assert ((found - keys).abs() <= keys.abs() * 2**-4 + 2**-10).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_values_are_within_half_a_step(preset):
    values = torch.randn(1, 2, 50, 64) + 2
    method = TurboQuant(preset, sink_tokens=4)
    found = method.code_values(values)
    assert torch.equal(found[:, :, :4], values[:, :, :4])
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    step = (high - low) / (2**method.v_bits - 1)
    # Half a step; then minimum and scale are rounded to 2^-11 of themselves.
    bound = step / 2 * (1 + 2**-20) + 2**-11 * (low.abs() + (high - low)) * (1 + 2**-10)
    error = (found - values).abs()
    assert (error <= bound).all()
    assert (error[:, :, 4:] > 0).any()
    assert torch.equal(
        method.code_values(torch.full((1, 1, 9, 64), 0.5)), torch.full((1, 1, 9, 64), 0.5)
    )


def slots(method, keys, values):
    """The slots [H, n, bytes] uint8 that a coded layer's tokens would take."""
    heads, tokens, dim = keys[0, :, method.sink_tokens :].shape
    k_bits, v_bits, _ = PRESETS[method.preset]
    parts = [np.zeros((heads, tokens, dim * k_bits), dtype=bool)]
    parts = [np.packbits(part, axis=2) for part in parts]
    if k_bits < 8:
        parts.append(np.zeros((heads, tokens, 1), dtype=np.float16).view(np.uint8))
    parts.append(np.packbits(np.zeros((heads, tokens, dim * v_bits), dtype=bool), axis=2))
    parts.append(np.zeros((heads, tokens, 2), dtype=np.float16).view(np.uint8))
    joined = np.concatenate(parts, axis=2)
    return np.pad(joined, ((0, 0), (0, 0), (0, joined.shape[2] % 2)))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sink_tokens", [0, 5])
def test_bytes_are_those_of_slots(preset, sink_tokens, prefix):
    method = TurboQuant(preset, 0, sink_tokens)
    row = method.memory_columns(method.compress(prefix))
    expected = 0
    for layer in prefix.cache.layers:
        expected += slots(method, layer.keys, layer.values).nbytes
        exact = layer.keys[:, :, :sink_tokens], layer.values[:, :, :sink_tokens]
        expected += sum(part.numel() * part.itemsize for part in exact)
    assert row["cache_bytes"] == expected
    assert row["k_bits"] == PRESETS[preset][0]
    if not sink_tokens:  # vLLM's slot of a head of 64: the numbers that its cache shape tells
        size = {"k8v4": 100, "4bit_nc": 70, "k3v4_nc": 62, "3bit_nc": 54}[preset]
        assert expected == 2 * 2 * TOKENS * size
        assert row["times_smaller_bf16"] == 256 / size


def test_slots_are_even():
    keys = torch.zeros(1, 3, 10, 4)  # 2 + 2 and 2 + 4 bytes; 4-bit values: 2 + 4
    for preset, size in (("3bit_nc", 10), ("k8v4", 10)):
        method = TurboQuant(preset)
        found = method.layer_memory((3, 10, 4), 4).key_bytes + method.value_bytes((3, 10, 4), 4)
        assert found == slots(method, keys, keys).nbytes == 30 * size
    # An odd slot: 5 numbers of 3 bits take 2 bytes, in float8 5; 5 of 4 bits take 3.
    method = TurboQuant("k3v4_nc")
    found = method.layer_memory((3, 10, 5), 4).key_bytes + method.value_bytes((3, 10, 5), 4)
    keys = torch.zeros(1, 3, 10, 5)
    assert found == slots(method, keys, keys).nbytes == 30 * 12


def test_first_and_last_layers_stay(monkeypatch):
    config = CONFIGS["llama"]
    monkeypatch.setattr(config, "num_hidden_layers", 5)
    prefix = read_prefix(make_model("llama", "sdpa"), make_tokens(1, TOKENS))
    method = TurboQuant("4bit_nc")
    assert method.coded_layers(prefix) == [2]
    cache = method.compress(prefix)
    for index, (layer, exact) in enumerate(zip(cache.layers, prefix.cache.layers, strict=True)):
        assert torch.equal(layer.keys, exact.keys) == (index != 2)
        assert torch.equal(layer.values, exact.values) == (index != 2)
    row = method.memory_columns(cache)
    assert row["times_smaller_bf16"] == pytest.approx(5 / (4 + 70 / 256))
    assert row["k_bits"] == 4
    assert row["all_in_bits"] == pytest.approx((4 * 32 + 4 + 2 * 8 / 64) / 5)
    with pytest.raises(ValueError, match="no layer is coded of 5"):
        TurboQuant("4bit_nc", 3).compress(prefix)


def test_settings_out_of_range(prefix):
    with pytest.raises(ValueError, match="TurboQuant has k8v4, .*, got '2bit'"):
        TurboQuant("2bit")
    with pytest.raises(ValueError, match="skipped_layers must be at least 0, got -1"):
        TurboQuant("k8v4", -1)
    with pytest.raises(ValueError, match=f"nothing is coded of {TOKENS} tokens"):
        TurboQuant("k8v4", 0, TOKENS).compress(prefix)
    assert TurboQuant("k8v4").label == "TurboQuant k8v4"
    assert TurboQuant("k8v4", 0, 8).label == "TurboQuant k8v4, 0 exact layers an end, 8 sinks"
