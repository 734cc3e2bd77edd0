"""Profiles of a model's keys, measured on text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from svdq.cache.cache import SVDqCache
from svdq.fit.allocator import Answer, Demand
from svdq.fit.profile import Profile, mean_profile
from svdq_bench.quality.prefix import read_prefix

HIGH_BITS = 4  # what is measured does not depend on it


def measure_profile(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    rope: str = "pre",
    pre_channels: int = 8,
    query_weighted: bool = True,
    sink_tokens: int = 8,
    begin: Callable[[str], None] = lambda step: None,
) -> Profile:
    """Mean spectra of a model's keys over several prompts.

    Parameters
    ----------
    windows : prompts, [1, T] int64 each, at least one, long enough to fit a basis.
    rope, pre_channels, query_weighted, sink_tokens : of the caches that will use the profile.
    begin : called with the name of each step as it begins.

    Raises
    ------
    ValueError
        If there is no prompt, or one is too short.
    """
    if not windows:
        raise ValueError("expected at least one prompt to measure")
    profiles = []
    for number, window in enumerate(windows, 1):
        begin(f"prompt {number}")
        prefix = read_prefix(model, window)
        cache = SVDqCache(
            model.config,
            kv_bits=HIGH_BITS,
            rope=rope,
            pre_channels=pre_channels,
            query_weighted=query_weighted,
            sink_tokens=sink_tokens,
            residual_length=0,
        )
        demands: dict[int, Demand] = {}
        for layer in cache.svdq_layers:  # they tell their spectra and wait for an answer
            layer.allocate = functools.partial(_note, demands, layer.index)
        cache.prefill_from(prefix.cache, prefix.query_energy, prefix.samples, prefix.rules)
        if len(demands) < len(cache.svdq_layers):
            raise ValueError(f"a prompt of {window.shape[1]} tokens is too short to fit a basis")
        spectra = {i: demand.spectrum.cpu() for i, demand in demands.items()}
        losses = {i: demand.value_loss for i, demand in demands.items()}
        count = window.shape[1]
        profiles.append(Profile(spectra, rope, pre_channels, query_weighted, count, losses))
    return mean_profile(profiles)


def _note(demands: dict[int, Demand], layer: int, demand: Demand, answer: Answer) -> None:
    demands[layer] = demand
