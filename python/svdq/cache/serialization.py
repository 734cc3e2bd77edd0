"""Caches in safetensors files: packed bytes as they are, settings and lengths in the metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from svdq.cache.layer import SVDqLayer
from svdq.layout import FORMAT_VERSION, PageLayout
from svdq.store.packed import PackedStore
from svdq.store.tensors import normal_tensors

if TYPE_CHECKING:
    from svdq.cache.cache import SVDqCache

FORMAT = "svdq-cache"
State = dict[str, Any]
# Tensors of a store that are kept as they are.
OUTLIERS = ("slots", "keys", "least")
STORED = ("fit_error", "error", "k_pages", "v_pages")


def save(cache: SVDqCache, path: str | os.PathLike) -> None:
    """Write a cache; see :meth:`svdq.SVDqCache.save`."""
    states, tensors = [], {}
    for i, layer in enumerate(cache.layers):
        state, named = _save_svdq(layer) if isinstance(layer, SVDqLayer) else _save_sliding(layer)
        states.append({"kind": type(layer).__name__, **state})
        tensors.update(
            {
                f"{i}.{name}": x.clone(memory_format=torch.contiguous_format)
                for name, x in named.items()
            }
        )
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "settings": json.dumps(dataclasses.asdict(cache.settings)),
        "layers": json.dumps(states),
    }
    save_file(tensors, path, metadata)


@normal_tensors
def load(
    cls: type[SVDqCache],
    path: str | os.PathLike,
    config: PretrainedConfig,
    device: str | torch.device,
) -> SVDqCache:
    """Read a cache; see :meth:`svdq.SVDqCache.load`."""
    with safe_open(path, "pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a saved SVDqCache")
        if metadata["version"] != str(FORMAT_VERSION):
            raise ValueError(
                f"{path} has format version {metadata['version']}, this svdq reads {FORMAT_VERSION}"
            )
        settings = json.loads(metadata["settings"])
        if all(settings[name] is None for name in ("schedule", "k_bits", "lambda_")):
            settings["preset"] = "exact"
        cache = cls(config, **settings)
        states = json.loads(metadata["layers"])
        saved, expected = [s["kind"] for s in states], [type(x).__name__ for x in cache.layers]
        if saved != expected:
            raise ValueError(f"{path} has layers {saved}, the model has {expected}")
        tensors: list[dict[str, Tensor]] = [{} for _ in states]
        for key in file.keys():  # noqa: SIM118 (the file is no mapping)
            index, name = key.split(".", 1)
            tensors[int(index)][name] = file.get_tensor(key)
    shape = _kv_shape(config)
    for layer, state, named in zip(cache.layers, states, tensors, strict=True):
        if named and (named["keys"].shape[1], named["keys"].shape[3]) != shape:
            raise ValueError(
                f"{path} has keys {tuple(named['keys'].shape)}, the model (KV heads, head_dim) "
                f"{shape}"
            )
        if isinstance(layer, SVDqLayer):
            _load_svdq(layer, state, named)
        else:
            _load_sliding(layer, state, named)
    return cache


def _kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, dim


def _save_svdq(layer: SVDqLayer) -> tuple[State, dict[str, Tensor]]:
    if layer.pending:
        raise RuntimeError(
            f"layer {layer.index}: cannot be saved before its new tokens are attended"
        )
    if layer.seq_length == 0:
        return {"seq_length": 0}, {}
    rows = layer.tokens.rows
    used = max(rows.count)
    state = {
        "seq_length": layer.seq_length,
        "padding": layer.padding,
        "knows_positions": layer.knows_positions,
        "count": rows.count,
        "first_position": layer.tokens.position,
    }
    tensors = {"keys": rows.keys[:, :, :used], "values": rows.values[:, :, :used]}
    if layer.tokens.energy is not None:
        tensors |= {"energy": layer.tokens.energy.total, "seen": layer.tokens.energy.count}
    if layer.tokens.weight is not None:
        tensors["weight"] = layer.tokens.weight
    state["stores"] = []
    for n, store in enumerate(layer.tokens.stores):
        pages = sorted(store.used_pages)
        renumbered = {page: i for i, page in enumerate(pages)}
        state["stores"].append(
            {
                "layout": store.layout.ints,
                "pages": [[renumbered[page] for page in own] for own in store.pages],
                "slots": store.slots,
                "fitted": store.fitted,
                "position": store.position,
            }
        )
        named = {name: getattr(store, name) for name in (*store.coding, *STORED)}
        named |= {name: named[name][pages] for name in ("k_pages", "v_pages")}
        if store.landmarks is not None:
            landmarks = store.landmarks
            named |= {f"landmark_{x}": getattr(landmarks, x)[pages] for x in landmarks.NAMES}
        if store.outliers is not None:
            named |= {f"outlier_{name}": getattr(store.outliers, name) for name in OUTLIERS}
        if store.inv_freq is not None:
            named["inv_freq"] = store.inv_freq
        tensors |= {f"{n}.{name}": x for name, x in named.items()}
    return state, tensors


def _load_svdq(layer: SVDqLayer, state: State, tensors: dict[str, Tensor]) -> None:
    if state["seq_length"] == 0:
        return
    layer.lazy_initialization(tensors["keys"])
    for name in ("seq_length", "padding", "knows_positions"):
        setattr(layer, name, state[name])
    rows = layer.tokens.rows
    rows.keys, rows.values = tensors["keys"], tensors["values"]
    rows.set_count(state["count"])
    layer.tokens.position = state["first_position"]
    if layer.tokens.energy is not None:
        layer.tokens.energy.total, layer.tokens.energy.count = tensors["energy"], tensors["seen"]
    if "weight" in tensors:
        layer.tokens.weight = tensors["weight"]
    stores = [_load_store(layer, n, own, tensors) for n, own in enumerate(state["stores"])]
    if stores:
        *layer.tokens.past, layer.tokens.packed = stores


def _load_store(layer: SVDqLayer, n: int, state: State, tensors: dict[str, Tensor]) -> PackedStore:
    layout = PageLayout.from_ints(state["layout"])
    own = layer.tokens.packed.layout if layer.tokens.packed is not None else layout
    if layout != own:
        raise ValueError(
            f"layer {layer.index}: pages have layout {layout.ints}, the model {own.ints}"
        )
    settings = layer.settings
    store = PackedStore(
        layout,
        layer.batch_size,
        layer.dtype,
        layer.device,
        settings.outlier_fraction,
        settings.needs_landmarks,
    )
    if store.landmarks is not None:
        for name in store.landmarks.NAMES:
            setattr(store.landmarks, name, tensors[f"{n}.landmark_{name}"])
    if store.outliers is not None:
        for name in OUTLIERS:
            setattr(store.outliers, name, tensors[f"{n}.outlier_{name}"])
    for name in (*store.coding, *STORED):
        setattr(store, name, tensors[f"{n}.{name}"])
    if f"{n}.inv_freq" in tensors:
        store.inv_freq = _matching_frequencies(layer, tensors[f"{n}.inv_freq"])
    for name in ("slots", "fitted"):
        setattr(store, name, state[name])
    store.marked = list(store.fitted)
    store.set_first_position(state["position"])
    store.set_pages([tuple(own) for own in state["pages"]])
    return store


def _matching_frequencies(layer: SVDqLayer, saved: Tensor) -> Tensor:
    """The layer's own frequencies, if they are the saved ones for short or for long sequences."""
    if layer.frequencies is not None:
        for max_position in (0, torch.iinfo(torch.int32).max):
            own = layer.frequencies(max_position).to(saved.device)
            if torch.equal(own, saved):
                return own
    raise ValueError(f"layer {layer.index}: keys were packed under another rotary embedding")


def _save_sliding(layer: Any) -> tuple[State, dict[str, Tensor]]:
    if type(layer) is not DynamicSlidingWindowLayer:
        raise NotImplementedError(f"saving a {type(layer).__name__} is not supported")
    if not layer.is_initialized or layer.keys is None:
        return {"seq_length": 0}, {}
    tensors = {"keys": layer.keys, "values": layer.values}
    return {"seq_length": layer.cumulative_length}, tensors


def _load_sliding(layer: Any, state: State, tensors: dict[str, Tensor]) -> None:
    if state["seq_length"]:
        layer.update(tensors["keys"], tensors["values"])
        layer.cumulative_length = state["seq_length"]
