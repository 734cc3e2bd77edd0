"""Means of paired differences and how sure they are, where contexts are what was drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of contexts.

    Parameters
    ----------
    mean, square : means over contexts of a context's mean and of its square.
    contexts : how many there are.
    """

    mean: float
    square: float
    contexts: int

    @property
    def variance(self) -> float | None:
        """Of the mean, as it varies from draw to draw of the contexts; None for one of them."""
        if self.contexts < 2:
            return None
        return max(self.square - self.mean**2, 0) / (self.contexts - 1)

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % confidence interval; None for one context."""
        if self.variance is None:
            return None
        return t_quantile(self.contexts - 1) * math.sqrt(self.variance)


def interval(values: Sequence[Sequence[float]]) -> Interval:
    """The mean of questions that are grouped by context, as many in each.

    Questions about one context share its text and its compressed cache, so their scores vary
    together: the spread of the contexts' means says how sure the mean is, that of the questions
    does not.
    """
    means = [statistics.fmean(group) for group in values]
    return Interval(statistics.fmean(means), statistics.fmean(x * x for x in means), len(means))


def mean_half_width(intervals: Sequence[Interval]) -> float | None:
    """Half-width of the mean of several intervals, drawn apart; None if one of them has none.

    Degrees of freedom are those of Welch and Satterthwaite.
    """
    variances = [one.variance for one in intervals]
    if not variances or None in variances:
        return None
    total = sum(variances)
    if total == 0:
        return 0.0
    shares = sum(
        (variance / total) ** 2 / (one.contexts - 1)
        for variance, one in zip(variances, intervals, strict=True)
    )
    return t_quantile(1 / shares) * math.sqrt(total) / len(intervals)


def t_quantile(freedom: float) -> float:
    """Bound that Student's t exceeds to either side with a probability of 5 %.

    From four degrees of freedom on, the expansion of Cornish and Fisher is right to 0.1 %; below,
    the exact values of one to four are interpolated.
    """
    exact = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
    if freedom < 4:
        low = max(math.floor(freedom), 1)
        share = max(freedom - low, 0)
        return exact[low] * (1 - share) + exact[low + 1] * share
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
