"""Budgets of attended tokens in a user's words."""

from __future__ import annotations

import re
from fractions import Fraction

# Shares that nobody means exactly (0.03125) are written with denominators up to this.
LARGEST_DENOMINATOR = 256


def parse_budget(text: str) -> int | float:
    """A number of tokens ("2048"), or a share of them ("1/32", "0.03125").

    Raises
    ------
    ValueError
        For anything else.
    """
    if re.fullmatch(r"\d+(\.\d+)?|\d+/\d*[1-9]\d*", text):
        value = Fraction(text)
        if 0 < value < 1:
            return float(value)
        if value >= 1 and value.denominator == 1:
            return int(value)
    raise ValueError(
        f"a budget must be a number of tokens like 2048, or a share of them like 1/32, got {text!r}"
    )


def budget_text(budget: int | float) -> str:
    """A budget in words: "1/32" for a share, "2,048 tokens" for a number."""
    if budget >= 1:
        return f"{int(budget):,} tokens"
    share = Fraction(budget).limit_denominator(LARGEST_DENOMINATOR)
    return f"{share}" if abs(share - Fraction(budget)) < 1e-9 else f"{budget:g}"
