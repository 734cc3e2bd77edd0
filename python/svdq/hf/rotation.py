"""How the layers of a model rotate their keys: seen on a tiny model, not believed.

Configurations do not say all of it: some layers of hybrid models do not rotate, and each family has
a name of its own for that. A token alone in its sequence attends to itself, so its keys at two
positions differ by the rotation and nothing else, in every layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from svdq.hf.arguments import cache_argument
from svdq.hf.rope import CannotUnrotate, inverse_frequencies
from svdq.hf.tiny_model import ConfigKey, aside, build, shrink

POSITION = 57
# Angles up to 57 are rounded to float32, and so are products.
ERROR = 4 * (POSITION + 2) * 2.0**-24
MAX_WIDTH = 1024  # of a model that is built with its full width


@dataclass(frozen=True)
class Rotation:
    """What is known of a layer's rotation.

    Parameters
    ----------
    rotates : whether its keys depend on their position at all.
    reason : why keys cannot be un-rotated exactly; None where they can, with the frequencies that
        :func:`svdq.hf.rope.inverse_frequencies` reads from the configuration.
    """

    rotates: bool
    reason: str | None = None


def rotation_of(config: PretrainedConfig, index: int) -> Rotation:
    """The rotation of one layer of a decoder.

    Parameters
    ----------
    config : of the text decoder.
    index : of the layer.
    """
    seen = _observed(ConfigKey(config))
    if isinstance(seen, str):
        return Rotation(True, seen)
    if index not in seen:
        return Rotation(True, "its keys could not be observed")
    here, there = seen[index]
    allowed = ERROR * here.abs().max()
    if not allowed:
        return Rotation(True, "a tiny model of its configuration has keys of zeros")
    if (there - here).abs().max() <= allowed:
        return Rotation(False)
    try:
        inv_freq = inverse_frequencies(config, index, POSITION)
    except CannotUnrotate as error:
        return Rotation(True, error.reason)
    if inv_freq is None or (unrotated(there, inv_freq) - here).abs().max() > allowed:
        return Rotation(
            True,
            "its keys differ between positions by something else than the rotation of halves that "
            "its configuration names",
        )
    return Rotation(True)


def unrotated(keys: Tensor, inv_freq: Tensor) -> Tensor:
    """Keys [..., D] at ``POSITION`` rotated back, the pairs being channels i and i + rotary / 2."""
    pairs = len(inv_freq)
    cosine, sine = (POSITION * inv_freq).cos(), (POSITION * inv_freq).sin()
    first, second, rest = keys.split([pairs, pairs, keys.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], -1)


@functools.lru_cache(maxsize=64)
def _observed(key: ConfigKey) -> dict[int, tuple[Tensor, Tensor]] | str:
    """Keys [H, D] of one token at positions 0 and ``POSITION``, by layer; or why there are none."""
    reason = ""
    for keep_width in (False, True):
        if keep_width and key.config.hidden_size > MAX_WIDTH:
            break
        try:
            with aside():
                return _observe(shrink(key.config, keep_width=keep_width))
        except Exception as error:  # whatever a model of any family may raise
            reason = reason or f"{type(error).__name__}: {error}"
    return f"no tiny model of its configuration could be run ({reason[:200]})"


def _observe(config: PretrainedConfig) -> dict[int, tuple[Tensor, Tensor]]:
    model, caught = build(config), []
    for position in (0, POSITION):
        cache = DynamicCache(config=config)
        where = torch.tensor([[position]])
        model(torch.tensor([[1]]), position_ids=where, use_cache=True, **cache_argument(cache))
        keys = [getattr(layer, "keys", None) for layer in cache.layers]
        caught.append([None if x is None else x[0, :, 0].float() for x in keys])
    return {
        i: (here, there)
        for i, (here, there) in enumerate(zip(*caught, strict=True))
        if here is not None and here.numel()
    }
