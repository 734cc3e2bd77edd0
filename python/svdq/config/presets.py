"""Named bit schedules: bits for each eighth of the latent channels, most important first."""

from __future__ import annotations

from collections.abc import Sequence

from svdq.layout import VALUE_BITS, WIDTHS

Schedule = tuple[int, ...]

# The paper's key bits are the mean of its eight numbers (SVDq, Eq. 6). None keeps keys and values
# exact.
PRESETS: dict[str, Schedule | None] = {
    "paper-2.25": (8, 4, 4, 2, 0, 0, 0, 0),
    "paper-2.0": (8, 4, 2, 1, 1, 0, 0, 0),
    "paper-1.25": (4, 4, 2, 0, 0, 0, 0, 0),
    "exact": None,
}
# Averages where a cache is given none: of keys and values, and of keys where those of values are
# given. Chosen by docs/evaluation.md#defaults.
KV_BITS, K_BITS = 2.5, 2.0
EXACT_BITS = 16
MAX_BITS = max(WIDTHS)
# Averages of keys and values: values of the fewest bits alone, and the most bits of both.
MIN_KV_BITS, MAX_KV_BITS = min(VALUE_BITS) / 2, (max(WIDTHS) + max(VALUE_BITS)) / 2


def preset_bits(name: str) -> float:
    """Code bits per key number that a preset asks for (16 for ``"exact"``)."""
    schedule = PRESETS[name]
    return float(EXACT_BITS) if schedule is None else sum(schedule) / len(schedule)


def resolve_keys(
    preset: str | None = None,
    schedule: Sequence[int] | None = None,
    k_bits: float | None = None,
    lambda_: float | None = None,
    kv_bits: float | None = None,
) -> tuple[Schedule | None, float | None]:
    """Resolve the settings of a cache to a bit schedule, or to the key bits to allocate.

    Both are None for exact keys, and with ``lambda_`` or ``kv_bits``.

    Parameters
    ----------
    preset : a name of :data:`PRESETS`.
    schedule : bits per equal group of channels, each of 8, 4, 2, 1, 0, not increasing, not all
        zero.
    k_bits : 16 for exact keys, else above 0 and at most 8.
    lambda_ : price of a bit, above 0.
    kv_bits : above 1 and at most 6.

    Raises
    ------
    ValueError
        For none or more than one of the five, an unknown preset, a number out of range, or a
        schedule that is none.
    """
    given = {"preset": preset, "schedule": schedule, "k_bits": k_bits}
    given |= {"kv_bits": kv_bits, "lambda_": lambda_}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give one of preset, schedule, k_bits, kv_bits and lambda_, got {given}")
    if schedule is not None:
        return _check_schedule(schedule), None
    if lambda_ is not None:
        if not 0 < lambda_ < float("inf"):
            raise ValueError(f"lambda_ must be above 0, got {lambda_!r}")
        return None, None
    if kv_bits is not None:
        if not MIN_KV_BITS < kv_bits <= MAX_KV_BITS:
            raise ValueError(
                f"kv_bits must be above {MIN_KV_BITS} and at most {MAX_KV_BITS}, got {kv_bits!r}"
            )
        return None, None
    if k_bits is not None and k_bits != EXACT_BITS:
        if not 0 < k_bits <= MAX_BITS:
            raise ValueError(
                f"k_bits must be above 0 and at most {MAX_BITS}, or {EXACT_BITS}, got {k_bits!r}"
            )
        return None, float(k_bits)
    if k_bits is not None:
        preset = "exact"
    if preset is None:
        raise ValueError("give one of preset, schedule, k_bits, kv_bits and lambda_")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    return PRESETS[preset], None


def _check_schedule(schedule: Sequence[int]) -> Schedule:
    widths = tuple(schedule)
    allowed = {*WIDTHS, 0}
    falling = list(widths) == sorted(widths, reverse=True)
    if not widths or not allowed.issuperset(widths) or not falling or not any(widths):
        raise ValueError(
            f"schedule must be widths of {sorted(allowed, reverse=True)}, not increasing and not "
            f"all zero, got {widths}"
        )
    return tuple(int(width) for width in widths)
