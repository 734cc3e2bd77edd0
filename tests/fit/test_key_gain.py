"""Gain of keys and the energies of queries that it comes from."""

import pytest
import torch

from support import assert_same, make_inv_freq, make_keys, make_layout
from svdq.fit.key_gain import MAX_EXPONENT, QueryEnergy, key_gain, score_spectrum
from svdq.store import packed as storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_energy_is_the_mean_of_squares_and_queries_stay_as_they_are(dtype):
    torch.manual_seed(0)
    query = torch.randn(2, 6, 1500, 32).to(dtype)
    before = query.clone()
    energy = QueryEnergy(2, 3, 32, query.device)
    energy.add(query[:, :, :1400], 0.5, [100, 0])
    energy.add(query[:, :, 1400:], 0.5, [0, 0])
    assert torch.equal(query, before)
    for b, pad in enumerate((100, 0)):
        grouped = query[b, :, pad:].double().unflatten(0, (3, 2)) / 2
        expected = grouped.square().mean(dim=(1, 2))
        # Sums of 1500 positive numbers: fewer roundings than numbers.
        torch.testing.assert_close(energy.mean(b, 0).double(), expected, rtol=1500 * 2**-24, atol=0)
        paired = energy.mean(b, 12).double()
        pairs = (expected[:, :12] + expected[:, 12:24]) / 2
        expected = torch.cat([pairs, pairs, expected[:, 24:]], dim=1)
        torch.testing.assert_close(paired, expected, rtol=1500 * 2**-24, atol=0)


def test_gains_are_powers_of_two_near_the_root():
    energy = torch.rand(4, 64).exp2() * torch.logspace(-3, 3, 4)[:, None]
    energy[0, 0], energy[1, 1] = 1e9, 0
    gain = key_gain(energy)
    exponents = gain.log2()
    assert torch.equal(exponents, exponents.round())
    assert exponents.abs().max() == MAX_EXPONENT
    relative = energy[2:] / energy[2:].mean(dim=1, keepdim=True)
    assert ((gain[2:].square() / relative).log2().abs() <= 1 + 1e-5).all()


def test_components_are_ordered_by_what_queries_see():
    torch.manual_seed(1)
    components = torch.linalg.qr(torch.randn(2, 16, 16, dtype=torch.float64))[0].mT
    variance = torch.rand(2, 16, dtype=torch.float64).sort(descending=True).values
    energy = torch.rand(2, 16, dtype=torch.float64).exp() ** 3
    ordered, spectrum = score_spectrum(components, variance, energy)
    assert (spectrum.diff(dim=1) <= 0).all()
    for h in range(2):
        for row, value in zip(ordered[h], spectrum[h], strict=True):
            old = int((components[h] @ row).argmax())
            assert torch.equal(components[h, old], row)
            expected = variance[h, old] * (row.square() * energy[h]).sum()
            assert float(value) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("landmarks", [False, True])
def test_a_store_applies_gain_piece_by_piece(monkeypatch, landmarks):
    """Pages and errors are those of keys that were multiplied by their gain before."""
    layout = make_layout(64, [4, 2, 0, 0], 2, "pre")
    gain = torch.tensor([0.5, 1, 4, 2]).repeat(2, 1, 16).bfloat16()
    keys = make_keys(2, 700, 64, inv_freq=make_inv_freq(64)).bfloat16()
    values = torch.randn(2, 700, 64).bfloat16()
    monkeypatch.setattr(storage, "PIECE_TOKENS", 192)
    stores = []
    for given, factor in ((keys, gain), (keys * gain, None)):
        store = storage.PackedStore(
            layout, 1, torch.bfloat16, keys.device, outlier_fraction=0.02, landmarks=landmarks
        )
        store.set_frequencies(make_inv_freq(64))
        store.fit(0, given, 0, clip=True, gain=factor)
        store.pack(0, given, values, skip=8, gain=factor)
        stores.append(store)
    pieces, whole = stores
    used = slice(0, 10)  # pages of 640 tokens are full
    assert_same(pieces.pool.k_pages[used], whole.pool.k_pages[used])
    assert_same(pieces.pool.v_pages[used], whole.pool.v_pages[used])
    assert_same(pieces.pool.cache_seqlens, whole.pool.cache_seqlens)
    for name in ("basis", "scale", "mean"):
        assert_same(getattr(pieces.codec, name), getattr(whole.codec, name))
    for name in ("fit_error", "error"):
        assert_same(getattr(pieces.drift, name), getattr(whole.drift, name))
    assert_same(pieces.outliers.slots, whole.outliers.slots)
    assert_same(pieces.outliers.keys, whole.outliers.keys)
    if landmarks:
        assert_same(pieces.landmarks.codes[used], whole.landmarks.codes[used])
