"""Water-filling of bits, against a search through all widths, and what a cache makes of it."""

import itertools
from dataclasses import replace

import pytest
import torch

from svdq.fit.allocation import (
    BELOW_ONE_BIT,
    DISTORTION,
    GRANULE,
    PLAIN,
    USUAL,
    code_something,
    equal_budgets,
    overhead_bits,
    solve_lambda,
    value_widths,
    water_fill,
)
from svdq.fit.allocator import Allocator, Budget, Demand, solve_widths
from svdq.layout import WIDTHS, PageLayout


def make_spectrum(heads, dim, seed=0, decay=3.0):
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(heads, 1, generator=generator) * 4
    noise = torch.rand(heads, dim, generator=generator)
    return (level - decay * torch.linspace(0, 1, dim) + noise).exp().sort(descending=True).values


def bits_of(bands):
    return int((bands.long() * torch.tensor(WIDTHS)).sum())


def cost_of(spectrum, bands, price, overhead):
    """Error plus price of one head's bands, from the definition."""
    widths = [w for w, n in zip(WIDTHS, bands, strict=True) for _ in range(n)]
    widths += [0] * (len(spectrum) - len(widths))
    return sum(
        float(v) * DISTORTION[w] + price * (w + overhead * (w > 0))
        for v, w in zip(spectrum.double(), widths, strict=True)
    )


@pytest.mark.parametrize("overhead", [0.0, 0.4])
@pytest.mark.parametrize("price", [1e-3, 0.02, 0.1, 0.5, 3.0])
def test_no_other_bands_cost_less(price, overhead):
    """All ways to cut 24 channels into bands whose sizes the format allows."""
    spectrum = make_spectrum(3, 24, seed=1)
    found = water_fill(spectrum, price, overhead)
    granules = 24 // GRANULE
    for head, bands in zip(spectrum, found.tolist(), strict=True):
        best = min(
            cost_of(head, [GRANULE * n for n in counts], price, overhead)
            for counts in itertools.product(range(granules + 1), repeat=4)
            if sum(counts) <= granules and counts[3] % 2 == 0
        )
        # Without the rule that bands of one bit are pairs, granule by granule is the optimum. With
        # it, one granule is off by what a bit costs or saves there, at most its price.
        pairs = price * GRANULE * (1 + overhead)
        assert cost_of(head, bands, price, overhead) <= best * (1 + 1e-9) + pairs
        PageLayout(32, (tuple(bands), (4, 0, 0, 0)))  # the format takes them


def test_the_wider_of_two_equal_channels_never_comes_later():
    for seed in range(20):
        bands = water_fill(make_spectrum(8, 64, seed), 0.05)
        assert (bands >= 0).all() and (bands.sum(1) <= 64).all()
        assert (bands % GRANULE == 0).all() and (bands[:, 3] % 8 == 0).all()


@pytest.mark.parametrize("k_bits", [0.3, 0.7, 1.25, 3.0, 8.0])
def test_price_meets_the_budget(k_bits):
    spectra = [make_spectrum(3, 64, seed) for seed in range(5)]
    price, bands = solve_lambda(spectra, k_bits)
    spent = sum(map(bits_of, bands)) / (5 * 3 * 64)
    assert spent <= k_bits
    # One more step of one head changes at most 16 granules' worth of a bit or two.
    assert spent >= k_bits - 32 * GRANULE / (5 * 3 * 64)
    for spectrum, own in zip(spectra, bands, strict=True):
        assert torch.equal(own, water_fill(spectrum, price))


def test_bits_go_where_the_error_is():
    loud, quiet = make_spectrum(1, 64) * 100, make_spectrum(1, 64)
    _, (first, second) = solve_lambda([quiet, loud], 1.0)
    assert bits_of(second) > 2 * bits_of(first)


@pytest.mark.parametrize("k_bits", [0.25, 0.7, 1.25, 2.0, 5.0, 8.0])
@pytest.mark.parametrize("dim", [64, 128])
def test_equal_budgets_are_equal_and_spent(k_bits, dim):
    spectrum = make_spectrum(6, dim, 3) * torch.logspace(-3, 3, 6)[:, None]
    bands = equal_budgets(spectrum, k_bits)
    assert {bits_of(head) for head in bands} == {int(k_bits * dim / 8) * 8}
    PageLayout(dim, tuple(map(tuple, bands.tolist())))


def test_budget_below_a_byte_is_refused():
    with pytest.raises(ValueError, match=r"k_bits=0.05 of head_dim 64 is less than a byte"):
        equal_budgets(make_spectrum(1, 64), 0.05)


def test_a_layer_never_goes_without():
    spectrum = make_spectrum(3, 64)
    bands = code_something(water_fill(spectrum, 1e9), spectrum)
    assert bits_of(bands) == 2 * GRANULE
    assert bands[int(spectrum[:, 0].argmax())].sum() == GRANULE


def test_overhead_falls_with_the_tokens():
    assert overhead_bits(64, 1056) == 1.0
    assert overhead_bits(64, 10560) == pytest.approx(0.1)


def test_layers_wait_for_the_last_one():
    spectra = [make_spectrum(2, 64, seed) for seed in range(3)]
    allocator, answers = Allocator(3, Budget(k_bits=0.7)), {}

    def ask(layer, spectrum, name):
        allocator.ask(layer, Demand(spectrum), lambda x: answers.update({name: x.bands}))

    ask(2, spectra[2], 2)
    ask(0, spectra[0], 0)
    assert not answers
    ask(1, spectra[1], 1)
    price = allocator.solution.lambda_
    assert allocator.solution.emphasis == BELOW_ONE_BIT
    for i, spectrum in enumerate(spectra):
        assert torch.equal(answers[i], water_fill(spectrum, price, 0.0, BELOW_ONE_BIT))
    spent = sum(bits_of(answers[i]) for i in range(3)) / sum(x.numel() for x in spectra)
    assert 0.68 < spent <= 0.7
    # Later questions are answered at once, at the same price.
    ask(0, spectra[0] * 2, "later")
    assert torch.equal(answers["later"], water_fill(spectra[0] * 2, price, 0.0, BELOW_ONE_BIT))
    allocator.reset()
    assert allocator.solution is None


def test_emphasis_gives_small_channels_more():
    spectrum = make_spectrum(2, 64)
    price, _ = solve_lambda([spectrum], 0.7)
    shares = []
    for emphasis in (PLAIN, USUAL, BELOW_ONE_BIT):
        bands = water_fill(spectrum, price, 0.0, emphasis)
        shares.append(int(bands.sum()))
    assert shares == sorted(shares) and shares[0] < shares[2]
    # Nothing else changes: of channels of one variance all count as they do.
    flat = torch.ones(1, 64)
    assert torch.equal(water_fill(flat, 1e-3, 0.0, USUAL), water_fill(flat, 1e-3))


def code_bits(widths):
    """Bits of the codes of keys and of values, averages a number."""
    keys = sum(bits_of(x.bands) for x in widths) / sum(64 * len(x.bands) for x in widths)
    values = [bits for x in widths for bits in x.v_bits]
    return keys, sum(values) / len(values)


def make_demands():
    """Two layers whose values lose little and much."""
    losses = torch.tensor([1e-3, 2e-3]), torch.tensor([0.1, 1.0])
    return [Demand(make_spectrum(2, 64, seed), value_loss=loss) for seed, loss in enumerate(losses)]


@pytest.mark.parametrize("v_bits", [2.25, 2.5, 3.5])
def test_values_get_bits_by_what_they_lose(v_bits):
    _, widths = solve_widths(make_demands(), Budget(k_bits=1.0, v_bits=v_bits))
    keys, values = code_bits(widths)
    assert keys <= 1.0 and v_bits - 0.26 < values <= v_bits
    every = [bits for x in widths for bits in x.v_bits]
    assert every == sorted(every)  # as the losses are
    plain = [replace(x, value_loss=None) for x in make_demands()]
    _, expected = solve_widths(plain, Budget(k_bits=1.0))
    assert all(torch.equal(a.bands, b.bands) for a, b in zip(widths, expected, strict=True))


@pytest.mark.parametrize("kv_bits", [1.5, 2.0, 3.0])
def test_one_budget_for_keys_and_values(kv_bits):
    demands = make_demands()
    solution, widths = solve_widths(demands, Budget(kv_bits=kv_bits))
    spent = sum(code_bits(widths)) / 2
    assert kv_bits - 0.26 < spent <= kv_bits
    # One price for both: nobody would trade bits of keys for bits of values.
    mean = torch.cat([x.value_loss for x in demands]).mean()
    for own, demand in zip(widths, demands, strict=True):
        assert own.v_bits == value_widths(demand.value_loss / mean, solution.lambda_, 64)
        bands = water_fill(demand.spectrum, solution.lambda_, 0.0, solution.emphasis)
        assert torch.equal(own.bands, bands)


def test_losses_of_values_have_a_unit_of_their_own():
    # All losses shrink as a context grows, and keys' errors do less harm in the same way.
    halved = [replace(x, value_loss=x.value_loss / 2) for x in make_demands()]
    _, expected = solve_widths(make_demands(), Budget(kv_bits=2.0))
    _, widths = solve_widths(halved, Budget(kv_bits=2.0))
    assert [x.v_bits for x in widths] == [x.v_bits for x in expected]
    assert all(torch.equal(a.bands, b.bands) for a, b in zip(widths, expected, strict=True))


def test_layers_fitted_later_pay_the_price_of_values():
    answers = []
    allocator = Allocator(2, Budget(k_bits=1.0, v_bits=2.5))
    for layer, demand in enumerate(make_demands()):
        allocator.ask(layer, demand, answers.append)
    for layer, demand in enumerate(make_demands()):
        allocator.ask(layer, demand, answers.append)
    assert [x.v_bits for x in answers[:2]] == [x.v_bits for x in answers[2:]]


def test_budgets_that_are_used_up():
    demand = Demand(make_spectrum(1, 64), taken=0.5, value_loss=torch.ones(1))
    for budget, message in (
        (Budget(k_bits=0.5), "k_bits=0.5 must be more than the 0.5 that pre-RoPE"),
        (Budget(kv_bits=1.25), "kv_bits=1.25 must be more than 1.25: values take 2 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            Allocator(1, budget).ask(0, demand, lambda x: None)
