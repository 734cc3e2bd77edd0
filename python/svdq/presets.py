"""Named bit schedules: bits for each eighth of the latent channels, most important first."""

from __future__ import annotations

from collections.abc import Sequence

from svdq.layout import WIDTHS

Schedule = tuple[int, ...]

# The paper's key bits are the mean of its eight numbers (SVDq, Eq. 6). None keeps keys and values
# exact.
PRESETS: dict[str, Schedule | None] = {
    "paper-2.25": (8, 4, 4, 2, 0, 0, 0, 0),
    "paper-2.0": (8, 4, 2, 1, 1, 0, 0, 0),
    "paper-1.25": (4, 4, 2, 0, 0, 0, 0, 0),
    "exact": None,
}
DEFAULT_PRESET = "paper-1.25"
EXACT_BITS = 16


def preset_bits(name: str) -> float:
    """Code bits per key number that a preset asks for (16 for ``"exact"``)."""
    schedule = PRESETS[name]
    return float(EXACT_BITS) if schedule is None else sum(schedule) / len(schedule)


def resolve_schedule(
    preset: str | None = None,
    schedule: Sequence[int] | None = None,
    k_bits: float | None = None,
) -> Schedule | None:
    """The bit schedule that the arguments of a cache ask for, None for exact keys.

    Parameters
    ----------
    preset : a name of :data:`PRESETS`.
    schedule : bits per equal group of channels, each of 8, 4, 2, 1, 0, not increasing, not all
        zero.
    k_bits : 16 for exact keys, else the bits of a preset (1.25, 2.0, 2.25).

    Raises
    ------
    ValueError
        For more than one of the three, an unknown preset or number of bits, or a schedule that is
        none.
    """
    given = {"preset": preset, "schedule": schedule, "k_bits": k_bits}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give one of preset, schedule and k_bits, got {given}")
    if schedule is not None:
        return _check_schedule(schedule)
    if k_bits is not None:
        names = {preset_bits(name): name for name in PRESETS}
        if k_bits not in names:
            raise ValueError(
                f"k_bits must be one of {sorted(names)}, got {k_bits!r}; or give a schedule"
            )
        preset = names[k_bits]
    preset = DEFAULT_PRESET if preset is None else preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    return PRESETS[preset]


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
