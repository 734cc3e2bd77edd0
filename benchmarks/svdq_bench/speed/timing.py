"""Timing several cases in one run, interleaved: they share the machine's good and bad moments."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WARMUP = 2  # rounds that do not count


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of every repeat of one case."""

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median over the repeats, in milliseconds."""
        return statistics.median(self.seconds) * 1e3

    @property
    def best_ms(self) -> float:
        """Fastest repeat, in milliseconds."""
        return min(self.seconds) * 1e3


def time_interleaved(
    cases: dict[str, Callable[[int], object]],
    repeats: int,
    warmup: int = WARMUP,
    begin: Callable[[str], None] = lambda step: None,
) -> dict[str, Timing]:
    """Time every case once a round, in an order that turns by one place from round to round.

    Parameters
    ----------
    cases : name to function; the function is given the number of the round, so that it can rotate
        among copies of its data and does not find them in a cache.
    repeats : timed rounds.
    warmup : rounds before them that do not count.
    begin : called with the name of every round as it begins, for a progress bar.
    """

    def measure(name: str, index: int) -> float:
        start = time.perf_counter()
        cases[name](index)
        return time.perf_counter() - start

    return take_turns(list(cases), measure, repeats, warmup, begin)


def take_turns(
    names: Sequence[str],
    measure: Callable[[str, int], float],
    repeats: int,
    warmup: int,
    begin: Callable[[str], None],
) -> dict[str, Timing]:
    """Measure every case once a round, as :func:`time_interleaved` does.

    Parameters
    ----------
    names : of the cases.
    measure : runs the case of a name in the round of a number; its seconds.
    repeats, warmup, begin : as for :func:`time_interleaved`.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + repeats):
        begin(f"round {index - warmup + 1}" if index >= warmup else "warm-up")
        turn = index % len(names)
        for name in [*names[turn:], *names[:turn]]:
            elapsed = measure(name, index)
            if index >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
