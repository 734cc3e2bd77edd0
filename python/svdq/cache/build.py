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
from transformers.utils import logging

from svdq import _C
from svdq.cache.layer import SVDqLayer
from svdq.cache.static_layer import StaticSVDqLayer
from svdq.config.settings import Settings
from svdq.fit.allocator import Allocator, Budget
from svdq.hf.rope import inverse_frequencies
from svdq.hf.rotation import rotation_of

logger = logging.get_logger(__name__)


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


def make_allocator(settings: Settings) -> Allocator | None:
    """The allocator of a cache whose widths follow from keys; it counts layers as they are made."""
    if not settings.allocates:
        return None
    v_bits = settings.v_bits if settings.allocates_values else None
    budget = Budget(settings.k_bits, v_bits, settings.kv_bits)
    return Allocator(0, budget, settings.lambda_, settings.allocate_across)


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
            _check_keys(config, i)
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
        rotation = rotation_of(config, index)
        if rotation.rotates and rotation.reason is None:
            own_frequencies = functools.partial(frequencies.of_layer, index)
        else:  # what does not rotate is un-rotated as it comes
            settings = dataclasses.replace(settings, rope="post")
        if rotation.reason is not None:
            logger.warning_once(
                f"SVDqCache: keys of {config.model_type!r} are packed as they come (rope='post'), "
                f"since they cannot be un-rotated: {rotation.reason}"
            )
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


def _check_keys(config: PretrainedConfig, index: int) -> None:
    """Refuse layers whose keys and values cannot be held in pages, from the configuration."""
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        raise NotImplementedError(
            f"{config.model_type!r} projects keys and values from a shared latent of {latent} "
            "numbers (multi-head latent attention), which is compressed already; SVDqCache does "
            "not support its keys, which are of another size than its values"
        )
    _, dim = kv_shape(config, index)
    if dim % 16 or not 0 < dim <= _C.format.MAX_HEAD_DIM:
        raise NotImplementedError(
            f"SVDqCache packs keys of a multiple of 16 numbers up to {_C.format.MAX_HEAD_DIM}; "
            f"those of {config.model_type!r} have head_dim {dim}"
        )


def kv_shape(config: PretrainedConfig, index: int) -> tuple[int, int]:
    """KV heads and head_dim of a decoder's layer."""
    layers = getattr(config, "per_layer_config", None)  # transformers 5
    config = config if layers is None else layers[index]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, dim
