"""Numbers as tables write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def number(digits: int) -> Callable[[float], str]:
    """A number with this many digits after the point."""
    return lambda value: f"{value:.{digits}f}"


def megabytes(value: float) -> str:
    """Bytes in units of 10^6."""
    return f"{value / 1e6:,.1f}"


def bits(value: float) -> str:
    """Bits, without zeros at the end."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


def fine_percent(value: float) -> str:
    """A small share in per cent."""
    return f"{100 * value:.2f} %"


def budget(value: int | float) -> str:
    """A budget of tokens as it is given."""
    from svdq_bench.quality.budgets import budget_text

    return budget_text(value)


def points_interval(value: tuple[float, float | None]) -> str:
    """A difference in points of a hundred, with its sign, and its half-width."""
    return _interval([None if part is None else 100 * part for part in value], 1)


def nats_interval(value: tuple[float, float | None]) -> str:
    """A difference in nats, with its sign, and its half-width."""
    return _interval(value, 3)


def _interval(value: Sequence[float | None], digits: int) -> str:
    mean, half_width = value
    width = "" if half_width is None else f" +- {half_width:.{digits}f}"
    return f"{mean:+.{digits}f}{width}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x"
