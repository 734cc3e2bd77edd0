"""The peer in KVQuant's style: levels, outliers, rotation and bytes."""

import numpy as np
import pytest
import torch

from cache_support import make_model, make_tokens
from svdq.hf.rope import inverse_frequencies
from svdq.reference.keys import rotate
from svdq_bench.quality.peers import KVQuant
from svdq_bench.quality.peers.kvquant import code_vectors, fit_levels, outlier_counts, pair_means
from svdq_bench.quality.peers.turboquant import normal_levels
from svdq_bench.quality.prefix import read_prefix

TOKENS = 300
PEERS = [KVQuant(3, "pre", 5, 2), KVQuant(2, "post", 0, 4), KVQuant(4, v_bits=4, outliers=0)]


@pytest.fixture(scope="module")
def prefix():
    return read_prefix(make_model("llama", "sdpa"), make_tokens(1, TOKENS))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_of_a_normal_variable_are_lloyd_and_max(bits):
    # Quantiles of a normal variable of deviation 1/8 around 1/2, cut off at 4 deviations.
    shares = torch.linspace(0, 1, 200_003, dtype=torch.float64)[1:-1]
    unit = (torch.special.ndtri(shares) / 8 + 0.5).clamp(0, 1)
    levels = fit_levels(unit, torch.ones_like(unit), bits)
    # Edges between levels are bins of 1/4096, and errors are quadratic in what they are off.
    assert ((levels - 0.5) * 8).tolist() == pytest.approx(normal_levels(bits).tolist(), abs=0.02)


def test_levels_go_where_the_weights_are():
    unit = torch.tensor([0.1, 0.3, 0.7, 0.9])
    heavy = fit_levels(unit, torch.tensor([1e6, 1e6, 1.0, 1.0]), 1)
    # Both levels at the heavy numbers; the light ones pull theirs by a millionth.
    assert heavy.tolist() == pytest.approx([0.1, 0.3], abs=2e-6)
    light = fit_levels(unit, torch.tensor([1.0, 1.0, 1.0, 1.0]), 1)
    assert light.tolist() == pytest.approx([0.2, 0.8])
    exact = fit_levels(unit, torch.ones(4), 2)
    assert exact.tolist() == pytest.approx(unit.tolist())


def test_outliers_are_exact_and_the_others_near_their_levels():
    x = torch.randn(6, 400) * torch.tensor([1, 5, 1, 1, 0.1, 1.0])[:, None]
    x[2, 17] = 60
    x[3, 5:9] = -40
    found = code_vectors(x, torch.ones(6), 4, 0.02)
    assert outlier_counts(400, 0.02) == (4, 4)
    for row, decoded in zip(x, found, strict=True):
        order = row.argsort()
        apart = torch.cat([order[:4], order[-4:]])
        assert torch.equal(decoded[apart], row[apart].half().float())
        inner = order[4:-4]
        low, span = row[inner].min(), row[inner].max() - row[inner].min()
        assert len(decoded[inner].unique()) <= 16
        # The nearest of 16 levels, none of them far from the next: at most a quarter of the range.
        assert ((decoded - row)[inner].abs() <= span / 4).all()
        assert (decoded[inner] >= low - 2**-10 * (low.abs() + span)).all()
    # Finer than uniform steps of the same range, as levels are where the numbers are.
    inner = x[0].sort().values[4:-4]
    step = (inner[-1] - inner[0]) / 15
    assert (found[0] - x[0]).square().mean() < step**2 / 12


def test_two_numbers_come_back():
    x = torch.tensor([[0.5, 2.0, 0.5, 2.0], [-8.0, -8.0, 4.0, -8.0]])
    assert torch.equal(code_vectors(x, torch.ones(2), 1, 0), x)
    assert torch.equal(
        code_vectors(torch.full((3, 40), 0.25), torch.ones(3), 2, 0.1), torch.full((3, 40), 0.25)
    )
    with pytest.raises(ValueError, match="range of float16"):
        code_vectors(x * 1e6, torch.ones(2), 1, 0.5)


@torch.inference_mode()
def test_keys_are_coded_before_rope(prefix):
    layer = prefix.cache.layers[1]
    method = KVQuant(3, "pre", 5)
    found = method.code_layer(prefix, 1)
    assert torch.equal(found[:, :, :5], layer.keys[:, :, :5])
    inv_freq = inverse_frequencies(prefix.config, 1)
    positions = torch.arange(TOKENS)
    unrotated = rotate(layer.keys, positions, inv_freq, inverse=True).float()
    decoded = rotate(found, positions, inv_freq, inverse=True).float()
    smallest, largest = outlier_counts(TOKENS - 5, 0.01)
    for head in range(2):
        for channel in range(64):
            column = unrotated[0, head, 5:, channel]
            order = column.argsort()
            inner = order[smallest : len(order) - largest]
            levels = decoded[0, head, 5:, channel][inner].sort().values
            # Rotations of float32 numbers to and fro: 2^-22 of the largest; a level apart is more.
            jumps = levels.diff() > 1e-4 * column.abs().max()
            assert jumps.sum() < 8
    post = KVQuant(3, "post", 5).code_layer(prefix, 1)
    assert torch.equal(post, KVQuant(3, "post", 5).code(layer.keys, prefix.query_energy[1]))
    assert not torch.equal(post, found)


def test_energy_of_pairs():
    energy = torch.tensor([[1.0, 2.0, 3.0, 6.0, 9.0]])
    assert pair_means(energy, 2).tolist() == [[2, 4, 2, 4, 9]]


def vector_bytes(vectors, bits, share):
    """Bytes of the arrays that an implementation would hold of vectors [V, N]."""
    count, length = vectors.shape
    outliers = round(share * length)
    planes = np.zeros(count * length * bits, dtype=bool)
    arrays = [
        np.packbits(planes),
        np.zeros((count, 2), dtype=np.float16),  # ranges
        np.zeros((count, outliers), dtype=np.float16),
        np.zeros((count, outliers), dtype=np.uint16),
        np.zeros(2**bits, dtype=np.float16),  # levels
    ]
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("method", PEERS, ids=lambda m: m.label)
def test_bytes_are_those_of_packed_arrays(method, prefix):
    row = method.memory_columns(method.compress(prefix))
    key_bytes = value_bytes = 0
    for layer in prefix.cache.layers:
        keys, values = (x[0, :, method.sink_tokens :] for x in (layer.keys, layer.values))
        key_bytes += vector_bytes(keys.mT.flatten(0, 1), method.bits, method.outliers)
        key_bytes += layer.keys[:, :, : method.sink_tokens].numel() * 4
        vectors = values.transpose(0, 1).flatten(1)
        value_bytes += vector_bytes(vectors, method.v_bits, method.outliers)
        value_bytes += layer.values[:, :, : method.sink_tokens].numel() * 4
    assert row["all_in_bits"] == 8 * key_bytes / sum(x.keys.numel() for x in prefix.cache.layers)
    assert row["cache_bytes"] == key_bytes + value_bytes
    assert row["k_bits"] == method.bits


def test_indices_of_long_vectors_take_four_bytes():
    short, long = (
        KVQuant(2, sink_tokens=0).layer_memory((1, tokens, 1), 4).key_bytes
        for tokens in (65_500, 65_600)
    )
    assert short == 65_500 // 4 + 4 + 655 * 4 + 8
    assert long == 65_600 // 4 + 4 + 656 * 6 + 8


def test_values_are_coded_token_by_token(prefix):
    method = KVQuant(3, "post", 6, 3)
    values = prefix.cache.layers[0].values
    found = method.code_values(values)
    assert torch.equal(found[:, :, :6], values[:, :, :6])
    assert not torch.equal(found, values)
    assert KVQuant(3).code_values(values) is values
    # 128 numbers of a token: one outlier, the largest.
    token, decoded = values[0, :, 20].flatten(), found[0, :, 20].flatten()
    assert decoded[token.argmax()] == token.max().half()
    assert len(decoded.unique()) <= 9


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: KVQuant(0), "bits must be 1 .. 8, got 0"),
        (lambda: KVQuant(2, "mid"), "rope must be 'pre' or 'post', got 'mid'"),
        (lambda: KVQuant(2, v_bits=9), "v_bits must be 1 .. 8, got 9"),
        (lambda: KVQuant(2, outliers=0.5), r"must be in \[0, 0.5\), got 0.5"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_coded_is_no_result(prefix):
    with pytest.raises(ValueError, match=f"nothing is coded of {TOKENS} tokens"):
        KVQuant(2, sink_tokens=TOKENS).compress(prefix)
