"""A cache with a calibration: its settings, and its layers checked against what was calibrated."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from svdq.cache.layer import SVDqLayer
from svdq.fit.calibration import CalibratedLayer, Calibration


def open_calibration(
    calibration: Calibration | str | os.PathLike | None, profile: Any
) -> Calibration | None:
    """A calibration from its file, if it is one; not together with a profile."""
    if calibration is None or isinstance(calibration, Calibration):
        found = calibration
    else:
        found = Calibration.load(calibration)
    if found is not None and profile is not None:
        raise ValueError("a calibration has allocated bits already: give it or a profile, not both")
    return found


def cache_options(calibration: Calibration | None, options: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a cache's settings; what was calibrated comes from the calibration.

    Raises
    ------
    ValueError
        For settings that contradict the calibration, or that need one, or cannot have one.
    """
    if calibration is None:
        if options.get("prompt_ranges"):
            raise ValueError("prompt_ranges is for caches with a calibration, got none")
        return options
    if options.get("outlier_fraction"):
        raise ValueError(
            "outlier_fraction does not go together with a calibration, whose prompts may begin "
            f"with too few tokens to choose outliers among, got {options['outlier_fraction']}"
        )
    return calibration.cache_options(options)


def calibrate_layers(
    calibration: Calibration, config: PretrainedConfig, layers: Sequence[SVDqLayer]
) -> None:
    """Give layers what was calibrated for them.

    Raises
    ------
    ValueError
        For another model, other layers or another rotary embedding than those of the calibration.
    """
    calibration.check_model(config, [layer.index for layer in layers])
    for layer in layers:
        found = calibration.layers[layer.index]
        _check_frequencies(calibration, layer, found)
        layer.calibrated = found


def _check_frequencies(calibration: Calibration, layer: SVDqLayer, found: CalibratedLayer) -> None:
    own = [] if layer.frequencies is None else [layer.frequencies(n) for n in (0, 2**31 - 1)]
    if found.inv_freq is None and not own:
        return
    if found.inv_freq is None or not any(torch.equal(x, found.inv_freq.to(x)) for x in own):
        raise ValueError(
            f"{calibration.source} is calibrated for another rotary embedding than that of layer "
            f"{layer.index} of this model"
        )


def mean_drift(drifts: Sequence[Sequence[float]]) -> list[float]:
    """Mean over layers of what is known of each sequence; NaN where nothing is."""
    means = []
    for own in zip(*drifts, strict=True):
        known = [x for x in own if not math.isnan(x)]
        means.append(statistics.fmean(known) if known else math.nan)
    return means
