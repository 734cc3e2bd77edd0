"""The layers of a cache for a model, made from its configuration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from svdq.cache.layer import SVDqLayer
from svdq.cache.static_layer import StaticSVDqLayer
from svdq.config.settings import Settings
from svdq.fit.allocator import Allocator
from svdq.hf.rope import inverse_frequencies


class Frequencies:
    """Inverse frequencies of a model's layers, one tensor for all layers that have the same.

    Attributes
    ----------
    known : the tensors that layers share.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._config = config
        self.known: list[Tensor] = []

    def of_layer(self, index: int, max_position: int) -> Tensor:
        """Those of layer ``index``, for sequences up to this position."""
        found = inverse_frequencies(self._config, index, max_position)
        for known in self.known:
            if torch.equal(known, found):
                return known
        self.known.append(found)
        return found


def make_layers(
    config: PretrainedConfig,
    settings: Settings,
    frequencies: Frequencies,
    allocator: Allocator | None,
) -> list[Any]:
    """One layer of the cache for each of a decoder's; sliding windows stay as transformers' are.

    Raises
    ------
    ValueError
        If no layer attends to all tokens.
    NotImplementedError
        For layers that cannot be compressed.
    """
    layers = DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i] = _make_layer(config, i, settings, frequencies, allocator)
        elif isinstance(layer, DynamicLayer) and type(layer) is not DynamicSlidingWindowLayer:
            raise NotImplementedError(
                f"layer {i} caches as {type(layer).__name__}, which SVDqCache cannot compress"
            )
    if settings.max_cache_len is not None and any(getattr(x, "lends", False) for x in layers):
        raise NotImplementedError(
            f"max_cache_len is not supported for {config.model_type!r}, whose layers share keys"
        )
    compressing = sum(isinstance(layer, SVDqLayer) for layer in layers)
    if not compressing:
        raise ValueError(
            f"{config.model_type!r} has no full-attention layer with this configuration, so "
            "nothing to compress"
        )
    if allocator is not None:
        allocator.num_layers = compressing
    return layers


def _make_layer(
    config: PretrainedConfig,
    index: int,
    settings: Settings,
    frequencies: Frequencies,
    allocator: Allocator | None,
) -> SVDqLayer:
    own_frequencies = None
    if settings.packs and settings.rope != "post":
        if inverse_frequencies(config, index) is None:  # this layer does not rotate its keys
            settings = dataclasses.replace(settings, rope="post")
        else:
            own_frequencies = functools.partial(frequencies.of_layer, index)
    allocate = functools.partial(allocator.ask, index) if allocator is not None else None
    kind = SVDqLayer if settings.max_cache_len is None else StaticSVDqLayer
    layer = kind(index, settings, own_frequencies, allocate)
    layer.lends = _lends(config, index)
    return layer


def _lends(config: PretrainedConfig, index: int) -> bool:
    """Whether layers without keys of their own attend to those of layer ``index``."""
    modes = getattr(config, "kv_sharing_modes", None)  # transformers 5
    if modes is not None:
        return modes[index] == "store"
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    types = config.layer_types[: config.num_hidden_layers - shared] if shared else []
    return index < len(types) and types[index] not in types[index + 1 :]


def check_dynamic_layers(layers: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Refuse the layers of another cache unless it is a ``DynamicCache`` for the same model."""
    fits = len(theirs) == len(layers) and all(
        type(other) is (DynamicLayer if isinstance(own, SVDqLayer) else type(own))
        for own, other in zip(layers, theirs, strict=True)
    )
    if not fits:
        raise ValueError(
            f"expected a DynamicCache of the same model, got layers "
            f"{[type(layer).__name__ for layer in theirs]}"
        )


def kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """KV heads and head_dim of a model."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, dim
