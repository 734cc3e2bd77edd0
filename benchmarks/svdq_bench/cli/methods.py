"""The caches that a command's options ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from svdq_bench.cli.options import Across, Rope, ScorerName

if TYPE_CHECKING:
    from svdq_bench.quality.matching import Matched
    from svdq_bench.quality.methods import CacheSettings
    from svdq_bench.quality.prefix import Method

NO_SVDQ = "none"  # the preset of no svdq cache at all


def asked_keys(
    presets: Sequence[str] | None,
    averages: Sequence[float] | None,
    prices: Sequence[float] | None = None,
    joint: Sequence[float] | None = None,
    default: Sequence[str] = ("paper-1.25",),
) -> list[str]:
    """The words for :func:`svdq_bench.quality.methods.key_argument` that the options mean.

    Parameters
    ----------
    presets, averages, prices, joint : of ``--preset``, ``--k-bits``, ``--lambda`` and
        ``--kv-bits``; in this order.
    default : what stands for none of them.
    """
    keys = list(presets or [])
    keys += [f"{bits:.12g}" for bits in averages or []]
    keys += [f"lambda={price:.12g}" for price in prices or []]
    keys += [f"kv={bits:.12g}" for bits in joint or []]
    return keys or list(default)


def make_methods(
    presets: Sequence[str] | None,
    peers: Sequence[str],
    *,
    v_bits: str,
    rope: Rope,
    clip: bool,
    sink_tokens: int,
    residual_length: int = 0,
    averages: Sequence[float] | None = None,
    prices: Sequence[float] | None = None,
    joint: Sequence[float] | None = None,
    across: Across = Across.model,
    weighted: bool | None = None,
    profile: Path | None = None,
    outlier_fraction: float = 0.0,
) -> list[Method | Matched]:
    """svdq with every preset, average and price, then the peers, which have the same sinks.

    The preset "none" stands for no svdq cache, so that peers are tested alone.

    Raises
    ------
    ValueError, ImportError
        For words that mean nothing, options that contradict each other, or a peer whose package is
        not installed.
    """
    from svdq_bench.quality.matching import parse_peer
    from svdq_bench.quality.methods import CacheSettings, key_argument

    keys = [word for word in asked_keys(presets, averages, prices, joint) if word != NO_SVDQ]
    if across is not Across.model and not any(
        key_argument(word).keys() & {"k_bits", "kv_bits"} for word in keys
    ):
        raise ValueError(f"--allocate-across {across.value} needs bits to allocate, see --k-bits")
    settings = []
    for word in keys:
        # Schedules have nothing to allocate; a price has no scope but the model, and says so.
        fixed = key_argument(word).keys() & {"preset", "schedule"}
        settings.append(
            CacheSettings(
                word,
                v_bits=v_bits,
                rope=rope.value,
                clip=clip,
                sink_tokens=sink_tokens,
                residual_length=residual_length,
                allocate_across="model" if fixed else across.value,
                query_weighted=weighted,
                profile=None if fixed or profile is None else str(profile),
                outlier_fraction=outlier_fraction,
            )
        )
    reference = settings[0] if settings else None
    return [*settings, *(parse_peer(peer, reference, sink_tokens) for peer in peers)]


def calibrated_method(path: Path, sink_tokens: int, residual_length: int) -> CacheSettings:
    """svdq with the calibration of ``--calibration``."""
    from svdq import Calibration
    from svdq_bench.quality.calibrated_loss import calibrated_settings

    found = Calibration.load(path)
    return calibrated_settings(found, sink_tokens=sink_tokens, residual_length=residual_length)


def with_budgets(
    methods: Sequence[Method | Matched],
    budgets: Sequence[str] | None,
    scorers: Sequence[ScorerName],
    channels: int,
    dense_layers: int,
) -> list[Method | Matched]:
    """Each svdq cache alone, then with every scorer and budget; all fed token by token.

    Parameters
    ----------
    budgets, scorers, channels, dense_layers : of ``--sparse-budget`` and its companions; without
        budgets the methods stay as they are.

    Raises
    ------
    ValueError
        For words that are no budgets, or options that only budgets give a meaning.
    """
    from svdq_bench.quality.budgets import parse_budget
    from svdq_bench.quality.methods import CacheSettings

    if not budgets:
        if dense_layers:
            raise ValueError("--dense-layers leaves layers out of a budget, see --sparse-budget")
        return list(methods)
    found = []
    for method in methods:
        if not isinstance(method, CacheSettings):
            found.append(method)
            continue
        found.append(replace(method, one_by_one=True))
        found += [
            replace(
                found[-1],
                sparse_budget=budget,
                sparse_scorer=scorer.value,
                sparse_channels=channels,
                dense_layers=dense_layers,
            )
            for scorer in dict.fromkeys(scorers)
            for budget in map(parse_budget, budgets)
        ]
    return found
