"""Weights of keys and the energies of queries that they come from."""

import pytest
import torch

from svdq.weighting import LARGEST_EXPONENT, QueryEnergy, key_weights, score_spectrum


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


def test_weights_are_powers_of_two_near_the_root():
    energy = torch.rand(4, 64).exp2() * torch.logspace(-3, 3, 4)[:, None]
    energy[0, 0], energy[1, 1] = 1e9, 0
    weights = key_weights(energy)
    exponents = weights.log2()
    assert torch.equal(exponents, exponents.round())
    assert exponents.abs().max() == LARGEST_EXPONENT
    relative = energy[2:] / energy[2:].mean(dim=1, keepdim=True)
    assert ((weights[2:].square() / relative).log2().abs() <= 1 + 1e-5).all()


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
