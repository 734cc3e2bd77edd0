"""Caches in safetensors files: packed bytes as they are, settings and lengths in the metadata."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from svdq.cache.layer import SVDqLayer
from svdq.cache.saved_checks import (
    check_count,
    check_integers,
    check_like,
    check_sliding,
    check_store,
    check_tokens,
)
from svdq.config.settings import Settings, renamed
from svdq.fit.allocator import Allocator
from svdq.layout import FORMAT_VERSION, PageLayout
from svdq.ops import KeyCodec
from svdq.store.packed import PackedStore

FORMAT = "svdq-cache"
State = dict[str, Any]
# Names in files, by the names of today where they differ: of earlier versions, and of outliers.
OLD_TENSORS = {"weight": "gain", "tail_mean": "post_mean", "outlier_least": "outlier_min_error"}


@dataclasses.dataclass
class SavedCache:
    """The contents of a file.

    Parameters
    ----------
    path : the file, for messages.
    settings : keywords of the cache.
    states, tensors : lengths and tensors of every layer.
    allocator : what is known of widths, or None; see :meth:`svdq.fit.allocator.Allocator.state`.
    digest : of the calibration that keys were packed with, or None.
    """

    path: str | os.PathLike
    settings: dict[str, Any]
    states: list[State]
    tensors: list[dict[str, Tensor]]
    allocator: State | None = None
    digest: str | None = None

    def check_calibration(self, digest: str | None) -> None:
        """Refuse another calibration than that of the file, by its digest."""
        if digest == self.digest:
            return
        if digest is None:
            raise ValueError(f"{self.path} was packed with a calibration: give calibration= too")
        packed = "without a calibration" if self.digest is None else "with another calibration"
        raise ValueError(f"{self.path} was packed {packed}")

    def restore(self, layers: Sequence[Any], kv_shapes: Sequence[tuple[int, int]]) -> None:
        """Put the saved tokens into the empty layers of a cache for these (KV heads, head_dim)."""
        saved, expected = [s["kind"] for s in self.states], [type(x).__name__ for x in layers]
        if saved != expected:
            raise ValueError(f"{self.path} has layers {saved}, the model has {expected}")
        lengths = {state["seq_length"] for state in self.states}
        if len(lengths) > 1:
            raise ValueError(f"its layers have different lengths, {sorted(lengths)}")
        for layer, state, named, kv_shape in zip(
            layers, self.states, self.tensors, kv_shapes, strict=True
        ):
            if named and (named["keys"].shape[1], named["keys"].shape[3]) != kv_shape:
                raise ValueError(
                    f"{self.path} has keys {tuple(named['keys'].shape)}, the model (KV heads, "
                    f"head_dim) {kv_shape}"
                )
            if isinstance(layer, SVDqLayer):
                _load_svdq(layer, state, named)
            else:
                _load_sliding(layer, state, named)


def save(
    layers: Sequence[Any],
    settings: Settings,
    path: str | os.PathLike,
    allocator: Allocator | None = None,
    digest: str | None = None,
) -> None:
    """Write a cache; see :meth:`svdq.SVDqCache.save`."""
    states, tensors = [], {}
    for i, layer in enumerate(layers):
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
        "settings": json.dumps(dataclasses.asdict(settings)),
        "layers": json.dumps(states),
        "allocator": json.dumps(None if allocator is None else allocator.state()),
    }
    if digest is not None:
        metadata["calibration"] = digest
    save_file(tensors, path, metadata | {"checksum": _checksum(metadata, tensors)})


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Make whatever is wrong with a file's contents one ``ValueError`` that names it."""
    try:
        yield
    except (NotImplementedError, OSError):  # about the model, or there is no file
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"{path} cannot be loaded, it is damaged or of another model: "
            f"{type(error).__name__}: {error}"
        ) from error


def read(path: str | os.PathLike, device: str | torch.device) -> SavedCache:
    """Read the contents of a file; see :meth:`svdq.SVDqCache.load`."""
    with safe_open(path, "pt", device="cpu") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a saved SVDqCache")
        if metadata["version"] != str(FORMAT_VERSION):
            raise ValueError(
                f"{path} has format version {metadata['version']}, this svdq reads {FORMAT_VERSION}"
            )
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    checksum = metadata.pop("checksum", None)  # files of earlier versions have none
    if checksum is not None and checksum != _checksum(metadata, found):
        raise ValueError(f"{path} is damaged: its contents do not have its checksum")
    settings = renamed(json.loads(metadata["settings"]))
    if all(settings[name] is None for name in ("schedule", "k_bits", "kv_bits", "lambda_")):
        settings["preset"] = "exact"
    states = json.loads(metadata["layers"])
    tensors: list[dict[str, Tensor]] = [{} for _ in states]
    for key, tensor in found.items():
        index, name = key.split(".", 1)
        # A copy: tensors of a file are parts of one mapped storage.
        tensors[int(index)][_today(name)] = tensor.to(device, copy=True)
    allocator = json.loads(metadata.get("allocator", "null"))
    return SavedCache(path, settings, states, tensors, allocator, metadata.get("calibration"))


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Of all that a file says, whatever the order."""
    found = hashlib.blake2b(digest_size=16)
    for name, text in sorted(metadata.items()):
        found.update(json.dumps([name, text]).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _today(name: str) -> str:
    """The name of a tensor of a layer, or of one of its stores, as it is written today."""
    store, dot, own = name.rpartition(".")
    return store + dot + OLD_TENSORS.get(own, own)


def _save_svdq(layer: SVDqLayer) -> tuple[State, dict[str, Tensor]]:
    if layer.pending:
        raise RuntimeError(
            f"layer {layer.index}: cannot be saved before its new tokens are attended"
        )
    if layer.seq_length == 0:
        return {"seq_length": 0}, {}
    tokens = layer.tokens
    window, used = tokens.window, max(tokens.window.count)
    state = {
        "seq_length": layer.seq_length,
        "padding": layer.padding,
        "knows_positions": layer.knows_positions,
        "count": window.count,
        "first_position": tokens.position,
    }
    tensors = {"keys": window.keys[:, :, :used], "values": window.values[:, :, :used]}
    if tokens.fit.energy is not None:
        tensors |= {"energy": tokens.fit.energy.total, "seen": tokens.fit.energy.count}
    if tokens.fit.value_loss is not None:
        loss = tokens.fit.value_loss
        tensors |= {f"value_{name}": getattr(loss, name) for name in loss.NAMES}
    if tokens.fit.gain is not None and tokens.fit.calibrated is None:
        tensors["gain"] = tokens.fit.gain
    state["stores"] = []
    for n, store in enumerate(tokens.stores):
        own, named = _save_store(store)
        state["stores"].append(own)
        tensors |= {f"{n}.{name}": x for name, x in named.items()}
    return state, tensors


def _save_store(store: PackedStore) -> tuple[State, dict[str, Tensor]]:
    pool = store.pool
    pages = pool.used_pages
    renumbered = {page: i for i, page in enumerate(pages)}
    state = {
        "layout": store.layout.ints,
        "pages": [[renumbered[page] for page in own] for own in pool.pages],
        "slots": pool.slots,
        "fitted": store.fitted,
        "position": store.position,
        "domain": store.domain,
    }
    named = store.own_tensors()
    named |= {name: getattr(store.drift, name) for name in store.drift.NAMES}
    named |= {"k_pages": pool.k_pages[pages], "v_pages": pool.v_pages[pages]}
    if store.landmarks is not None:
        landmarks = store.landmarks
        named |= {f"landmark_{x}": getattr(landmarks, x)[pages] for x in landmarks.NAMES}
    if store.outliers is not None:
        named |= {f"outlier_{x}": getattr(store.outliers, x) for x in store.outliers.NAMES}
    if store.codec.inv_freq is not None:
        named["inv_freq"] = store.codec.inv_freq
    return state, named


def _load_svdq(layer: SVDqLayer, state: State, tensors: dict[str, Tensor]) -> None:
    check_integers("seq_length", [state["seq_length"]], 0)
    if state["seq_length"] == 0:
        return
    check_tokens(state, tensors)
    layer.lazy_initialization(tensors["keys"])
    for name in ("seq_length", "padding", "knows_positions"):
        setattr(layer, name, state[name])
    tokens = layer.tokens
    tokens.window.keys, tokens.window.values = tensors["keys"], tensors["values"]
    tokens.window.set_count(state["count"])
    tokens.position = state["first_position"]
    if tokens.fit.energy is not None:
        energy = tokens.fit.energy
        check_like("energy", tensors["energy"], energy.total)
        check_like("seen", tensors["seen"], energy.count)
        energy.total, energy.count = tensors["energy"], tensors["seen"]
    if tokens.fit.value_loss is not None:
        for name in tokens.fit.value_loss.NAMES:
            check_like(name, tensors[f"value_{name}"], getattr(tokens.fit.value_loss, name))
            setattr(tokens.fit.value_loss, name, tensors[f"value_{name}"])
    if tokens.fit.gain is not None and tokens.fit.calibrated is None:
        check_like("gain", tensors["gain"], tokens.fit.gain)
        tokens.fit.gain = tensors["gain"]
    stores = [_load_store(layer, n, own, tensors) for n, own in enumerate(state["stores"])]
    if stores:
        *tokens.past, tokens.packed = stores
    check_count(tokens, state)


def _load_store(layer: SVDqLayer, n: int, state: State, tensors: dict[str, Tensor]) -> PackedStore:
    layout = PageLayout.from_ints(state["layout"])
    own = layer.tokens.packed.layout if layer.tokens.packed is not None else layout
    if layout != own:
        raise ValueError(
            f"layer {layer.index}: pages have layout {layout.ints}, the model {own.ints}"
        )
    named = {name.split(".")[1]: x for name, x in tensors.items() if name.startswith(f"{n}.")}
    store = layer.tokens.new_store(layout)
    check_store(store, state, named)
    for prefix, part in (("landmark_", store.landmarks), ("outlier_", store.outliers)):
        for name in () if part is None else part.NAMES:
            setattr(part, name, named[prefix + name])
    for name in store.drift.NAMES:
        setattr(store.drift, name, named[name])
    inv_freq = None
    if "inv_freq" in named:
        inv_freq = _matching_frequencies(layer, named["inv_freq"])
    elif any(state["fitted"]) and layer.frequencies is not None and layout.rope != "post":
        raise ValueError(f"layer {layer.index}: the frequencies of its keys are missing")
    shared = {} if store.calibrated is None else store.calibrated.codec.tensors()
    coded = {name: named.get(name, shared.get(name)) for name in store.codec.tensors()}
    store.codec = KeyCodec(**coded, inv_freq=inv_freq)
    store.fitted, store.drift.known = state["fitted"], list(state["fitted"])
    store.domain = state.get("domain", store.domain)
    store.set_first_position(state["position"])
    store.pool.k_pages, store.pool.v_pages = named["k_pages"], named["v_pages"]
    store.pool.slots = state["slots"]
    store.pool.set_pages(state["pages"])
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
    check_integers("seq_length", [state["seq_length"]], 0)
    if state["seq_length"]:
        check_sliding(layer, state, tensors)
        layer.update(tensors["keys"], tensors["values"])
        layer.cumulative_length = state["seq_length"]
