"""Confidence intervals of paired differences."""

import random

import pytest

from svdq_bench.quality.intervals import Interval, interval, mean_half_width, t_quantile


@pytest.mark.parametrize(
    "freedom, expected",
    [(1, 12.706), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (1e9, 1.96)],
)
def test_quantiles_are_those_of_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, rel=1e-3)


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng, held, trials = random.Random(0), 0, 2000
    for _ in range(trials):
        contexts = [rng.gauss(0, 1) for _ in range(6)]
        one = interval([[mean + rng.gauss(0, 0.5) for _ in range(10)] for mean in contexts])
        held += abs(one.mean) <= one.half_width
    # Three deviations of a binomial of 2000 trials.
    assert held / trials == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / trials) ** 0.5)


def test_means_of_intervals():
    one = interval([[0.0], [1.0], [2.0]])
    assert mean_half_width([one]) == pytest.approx(one.half_width)
    assert mean_half_width([one, one]) == pytest.approx(
        t_quantile(4) * (2 * one.variance) ** 0.5 / 2
    )
    assert mean_half_width([one, Interval(1, 1, 1)]) is None
    assert mean_half_width([interval([[1], [1]])]) == 0
