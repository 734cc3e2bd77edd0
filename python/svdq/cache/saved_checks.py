"""Checks of what a file says of a layer: contents that are wrong are refused, not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svdq.cache.checks import DTYPES
from svdq.layout import NO_SLOT, pages_of
from svdq.store.layer_store import LayerStore
from svdq.store.packed import PackedStore

State = dict[str, Any]
LARGEST = 2**31 - 1


def check_integers(
    name: str, numbers: Any, least: int, most: int = LARGEST, length: int | None = None
) -> None:
    """A list of so many integers in a range."""
    fits = isinstance(numbers, list) and all(type(n) is int and least <= n <= most for n in numbers)
    if not fits or length not in (None, len(numbers)):
        many = "integers" if length is None else f"{length} integers"
        raise ValueError(f"{name} must be {many} from {least} to {most}, got {numbers!r}")


def check_flags(name: str, flags: Any, length: int) -> None:
    """A list of so many booleans."""
    if not isinstance(flags, list) or [type(x) for x in flags] != [bool] * length:
        raise ValueError(f"{name} must be {length} booleans, got {flags!r}")


def check_numbers(name: str, numbers: Any, length: int) -> None:
    """A list of so many numbers, NaN among them."""
    fits = isinstance(numbers, list) and all(type(x) in (int, float) for x in numbers)
    if not fits or len(numbers) != length:
        raise ValueError(f"{name} must be {length} numbers, got {numbers!r}")


def check_like(name: str, tensor: Tensor, like: Tensor, free: Sequence[int] = ()) -> None:
    """A tensor has the shape, except in ``free`` dimensions, and the dtype of another."""
    sizes = [list(x.shape) for x in (tensor, like)]
    if len(sizes[0]) == len(sizes[1]):
        for d in free:
            sizes[0][d] = sizes[1][d] = -1
    if sizes[0] != sizes[1] or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name} must be {like.dtype} {list(like.shape)}, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """All numbers of a tensor are finite."""
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite")


def check_tokens(state: State, tensors: dict[str, Tensor]) -> None:
    """Lengths and window of a layer."""
    keys, values = tensors["keys"], tensors["values"]
    if keys.ndim != 4 or keys.dtype not in DTYPES:
        raise ValueError(f"keys must be [B, H, E, D] of {DTYPES}, got {keys.dtype} {keys.shape}")
    check_like("values", values, keys)
    batch, _, rows, _ = keys.shape
    check_integers("padding", state["padding"], 0, state["seq_length"], batch)
    check_integers("count", state["count"], 0, rows, batch)
    check_integers("first_position", state["first_position"], 0, LARGEST, batch)
    check_flags("knows_positions", [state["knows_positions"]], 1)
    for b, count in enumerate(state["count"]):
        for name, x in (("keys", keys), ("values", values)):
            check_finite(name, x[b, :, :count])


def check_store(store: PackedStore, state: State, named: dict[str, Tensor]) -> None:
    """Pages, codec and lengths of a store, whose layout is that of an empty one."""
    batch = len(store.slots)
    check_integers("slots", state["slots"], 0, LARGEST, batch)
    check_integers("position", state["position"], 0, LARGEST, batch)
    check_flags("fitted", state["fitted"], batch)
    pages = len(named["k_pages"])
    check_like("k_pages", named["k_pages"], store.pool.k_pages, [0])
    check_like("v_pages", named["v_pages"], store.pool.v_pages, [0])
    if len(named["v_pages"]) != pages or len(state["pages"]) != batch:
        raise ValueError(f"{pages} pages of keys and {len(named['v_pages'])} of values do not fit")
    for own, slots, fitted in zip(state["pages"], state["slots"], state["fitted"], strict=True):
        check_integers("pages", own, 0, pages - 1, pages_of(slots))
        if slots and not fitted or len(set(own)) != len(own):
            raise ValueError(f"a sequence of {slots} packed slots has pages {own}, fitted {fitted}")
    _check_codec(store, named)
    check_numbers("domain", state.get("domain", store.domain), batch)
    for name in store.drift.NAMES:
        check_like(name, named[name], getattr(store.drift, name))
    for name in () if store.landmarks is None else store.landmarks.NAMES:
        check_like(name, named[f"landmark_{name}"], getattr(store.landmarks, name), [0])
        if len(named[f"landmark_{name}"]) != pages:
            raise ValueError(f"landmarks of {pages} pages have {name} of another number")
    for name in () if store.outliers is None else store.outliers.NAMES:
        free = [] if name == "min_error" else [2]
        check_like(name, named[f"outlier_{name}"], getattr(store.outliers, name), free)
    if store.outliers is not None:
        _check_outliers(state, named["outlier_slots"], named["outlier_keys"])


def _check_codec(store: PackedStore, named: dict[str, Tensor]) -> None:
    """Sequences have codecs of their own, or what they have besides one that they share."""
    codec, batch = store.codec.tensors(), len(store.slots)
    found = codec.keys() & named.keys()
    if found not in (codec.keys(), store.own_tensors().keys()):
        raise ValueError(f"a codec of {sorted(codec)} cannot have {sorted(found)} alone")
    for name in found:
        check_like(name, named[name], codec[name].expand(batch, *codec[name].shape[1:]))
        check_finite(name, named[name])


def _check_outliers(state: State, slots: Tensor, keys: Tensor) -> None:
    if slots.shape[2] != keys.shape[2]:
        raise ValueError(f"{slots.shape[2]} outliers have {keys.shape[2]} keys")
    packed = torch.tensor(state["slots"], device=slots.device)[:, None, None]
    valid = ((slots >= 0) & (slots < packed)) | (slots == NO_SLOT)
    later = (slots[..., 1:] > slots[..., :-1]) | (slots[..., 1:] == NO_SLOT)
    if not bool(valid.all()) or not bool(later.all()):
        raise ValueError("slots of outliers must ascend and be packed")
    check_finite("outlier_keys", keys[slots < NO_SLOT])


def check_count(tokens: LayerStore, state: State) -> None:
    """A layer holds as many tokens as it says."""
    for b, pad in enumerate(state["padding"]):
        if tokens.count(b) != state["seq_length"] - pad:
            raise ValueError(
                f"sequence {b} of {state['seq_length']} tokens, {pad} of them padding, has "
                f"{tokens.count(b)}"
            )


def check_sliding(layer: Any, state: State, tensors: dict[str, Tensor]) -> None:
    """Keys and values of a sliding window."""
    keys, values = tensors["keys"], tensors["values"]
    check_like("values", values, keys)
    held = min(state["seq_length"], layer.sliding_window - 1)
    if keys.ndim != 4 or keys.shape[2] < held or keys.dtype not in DTYPES:
        raise ValueError(
            f"keys of a sliding window must be [B, H, {held} or more, D], got {keys.dtype} "
            f"{list(keys.shape)}"
        )
    check_finite("keys", keys)
    check_finite("values", values)
