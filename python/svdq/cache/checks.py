"""Checks of what a model hands to a layer of an :class:`svdq.SVDqCache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from svdq.hf.positions import read_positions
from svdq.store.layer_store import LayerStore

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layer(Protocol):
    """What checks read of a layer; all but the first three once it has been initialized.

    Attributes
    ----------
    index : of the layer in its model.
    seq_length : tokens per sequence, left padding included.
    frequencies : None where keys are packed as they come.
    batch_size, num_kv_heads, head_dim, dtype, device : of the keys.
    padding : left padding of each sequence; all of its slots until it has a token.
    knows_positions : whether the model tells the positions of its tokens.
    tokens : those stored.
    """

    index: int
    seq_length: int
    frequencies: Callable[[int], Tensor] | None
    batch_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    padding: list[int]
    knows_positions: bool
    tokens: LayerStore


def check_states(layer: Layer, keys: Tensor, values: Tensor) -> None:
    """New keys and values are [B, H, L, D] of one shape, dtype and device."""
    where, shape = f"layer {layer.index}", tuple(keys.shape)
    if len(shape) != 4 or 0 in shape or tuple(values.shape) != shape:
        raise ValueError(
            f"{where}: keys and values must be [B, H, L, D], of one shape and not empty, got "
            f"{shape} and {tuple(values.shape)}"
        )
    if values.dtype != keys.dtype:
        raise ValueError(
            f"{where}: keys and values must have one dtype, got {keys.dtype} and {values.dtype}"
        )
    if keys.device.type not in DEVICES:
        raise NotImplementedError(
            f"SVDqCache runs on {' and '.join(DEVICES)} tensors, got {keys.device}"
        )
    if keys.dtype not in DTYPES:
        raise ValueError(f"{where}: keys must be one of {DTYPES}, got {keys.dtype}")


def check_continues(layer: Layer, keys: Tensor) -> None:
    """New keys fit those that the layer holds."""
    expected = (layer.batch_size, layer.num_kv_heads, keys.shape[2], layer.head_dim)
    device = keys.device
    if tuple(keys.shape) != expected or keys.dtype != layer.dtype or device != layer.device:
        raise ValueError(
            f"layer {layer.index}: the cache holds {layer.seq_length} tokens and goes on with "
            f"{layer.dtype} of shape {expected} on {layer.device}, got {keys.dtype} of "
            f"{tuple(keys.shape)} on {device}; its batch changes through reorder_cache, "
            "batch_repeat_interleave and batch_select_indices. For another prompt call reset() or "
            "make a new cache"
        )


def check_query(layer: Layer, query: Tensor, length: int) -> None:
    """A query belongs to the new tokens."""
    batch, heads, queries, dim = query.shape
    fits = (batch, queries, dim) == (layer.batch_size, length, layer.head_dim)
    if not fits or heads % layer.num_kv_heads or query.dtype != layer.dtype:
        raise ValueError(
            f"layer {layer.index}: query must be {layer.dtype} [{layer.batch_size}, n * "
            f"{layer.num_kv_heads}, {length}, {layer.head_dim}], got {query.dtype} "
            f"{tuple(query.shape)}"
        )


def new_padding(layer: Layer, padding: list[int] | None, length: int) -> list[int]:
    """Padding of each sequence among new tokens: all of it is to the left of the first token.

    Parameters
    ----------
    padding : of all tokens, cached ones included; of one row for all; None for the tokens before.
    length : new tokens, L.
    """
    if padding is None:
        return [0] * layer.batch_size
    if len(padding) == 1:
        padding = padding * layer.batch_size
    if len(padding) != layer.batch_size:
        raise ValueError(
            f"layer {layer.index}: attention_mask must have {layer.batch_size} rows, or one for "
            f"all, got {len(padding)}"
        )
    found = []
    for b, pad in enumerate(padding):
        begun = layer.seq_length > 0 and layer.tokens.count(b) > 0
        if pad != layer.padding[b] if begun else pad < layer.seq_length:
            raise ValueError(
                f"layer {layer.index}: padding must stay as it was at prefill, {layer.padding}, "
                f"got {padding}; the cache holds {layer.seq_length} tokens, padding included. For "
                "another prompt call reset() or make a new cache"
            )
        found.append(0 if begun else min(pad - layer.seq_length, length))
    return found


def first_positions(
    layer: Layer, position_ids: Tensor | None, padding: list[int], consecutive: bool
) -> list[int]:
    """Position of the first new token of each sequence; for those that go on, of their next.

    It only matters where keys are un-rotated.

    Parameters
    ----------
    position_ids : [B or 1, L] of the new tokens, or None where the model does not tell.
    padding : of each sequence among the new tokens.
    consecutive : whether positions must follow each other.
    """
    batch = range(layer.batch_size)
    if layer.seq_length:
        counts = [layer.tokens.count(b) for b in batch]
        first = [layer.tokens.position[b] + counts[b] for b in batch]
    else:
        counts, first = [0] * layer.batch_size, [0] * layer.batch_size
    if position_ids is None or layer.frequencies is None:
        return first
    if any(counts) and not layer.knows_positions:
        return first
    rows = _rows_of(layer, position_ids)
    gaps = (later != row[i] + 1 for row in rows for i, later in enumerate(row[1:]))
    if not consecutive and any(gaps):
        return first
    for b, row in enumerate(rows):
        pad = padding[b]
        if not counts[b] and pad < len(row):
            first[b] = row[pad]
        for i in range(pad, len(row)):
            expected = first[b] + i - pad
            if row[i] != expected:
                raise ValueError(_wrong_position(layer, b, i, expected, row[i], counts[b]))
    return first


def _wrong_position(layer: Layer, b: int, i: int, expected: int, given: int, count: int) -> str:
    message = (
        f"layer {layer.index}: token {i} of sequence {b} must be at position {expected}, got "
        f"{given}"
    )
    if i == 0 and count:
        return (
            f"{message}: the cache holds {count} tokens of that sequence and goes on behind them. "
            "For another prompt call reset() or make a new cache"
        )
    return f"{message}: positions must follow each other where keys are un-rotated"


def _rows_of(layer: Layer, position_ids: Tensor) -> list[list[int]]:
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, layer.batch_size):
        raise ValueError(
            f"layer {layer.index}: position_ids must be [{layer.batch_size} or 1, L], got "
            f"{tuple(position_ids.shape)}"
        )
    rows = read_positions(position_ids, layer.seq_length)
    return rows if len(rows) == layer.batch_size else rows * layer.batch_size
