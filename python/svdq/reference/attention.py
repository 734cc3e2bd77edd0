"""Keys in pages, and attention over pages and the window."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from svdq.layout import NO_SLOT, PageLayout
from svdq.ops import KeyCodec, PackedKeys, Window
from svdq.reference.keys import _stored, code_keys, decode_keys
from svdq.reference.pages import unpack_codes, write_codes_
from svdq.reference.values import unpack_values


def pack_keys_(
    k_pages: Tensor,
    keys: Tensor,
    codec: KeyCodec,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    *,
    position: int = 0,
    errors: Tensor | None = None,
) -> None:
    """Project, quantize and store keys; see :func:`svdq.ops.pack_keys_`."""
    exact = exact_codec(codec)
    codes = code_keys(keys, exact, layout, position)
    write_codes_(k_pages, codes.long(), layout, page_table, slot)
    if errors is not None:
        errors.copy_((keys.double() - decode_keys(codes, exact, layout, position)).square().sum(-1))


def unpack_keys(
    k_pages: Tensor,
    codec: KeyCodec,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    num_tokens: int,
    *,
    position: int = 0,
) -> Tensor:
    """Decode keys and rotate them to their positions; see :func:`svdq.ops.unpack_keys`."""
    codes = unpack_codes(k_pages, layout, page_table, slot, num_tokens)
    return decode_keys(codes, codec, layout, position)


def exact_codec(codec: KeyCodec) -> KeyCodec:
    """The same codec with a float64 mean, whose keys are decoded to float64."""
    return replace(codec, mean=codec.mean.double())


def packed_keys(packed: PackedKeys, b: int) -> Tensor:
    """Keys [H, n, D] float64 of the packed slots of sequence b after its sinks."""
    count = max(int(packed.cache_seqlens[b]) - packed.sink_tokens, 0)
    first = 0 if packed.first_position is None else int(packed.first_position[b])
    codec, table = exact_codec(packed.codec.sequence(b)), packed.page_table[b]
    codes = unpack_codes(packed.k_pages, packed.layout, table, packed.sink_tokens, count)
    if packed.token_slots is None:
        keys = decode_keys(codes, codec, packed.layout, packed.sink_tokens + first)
    else:
        positions = packed.token_slots[b, :, :count].long() + first
        keys = torch.stack(
            [decode_keys(codes, codec, packed.layout, x)[h] for h, x in enumerate(positions)]
        )
    if packed.outlier_slots is None:
        return keys
    tokens = packed.outlier_slots[b] - packed.sink_tokens
    return replace_keys(keys, tokens, packed.outlier_keys[b])


def append_window_(
    window_keys: Tensor, window_values: Tensor, keys: Tensor, values: Tensor, start: int
) -> None:
    """Copy new tokens into the window; see :func:`svdq.ops.append_window_`."""
    window_keys[:, start : start + keys.shape[1]] = keys
    window_values[:, start : start + values.shape[1]] = values


def attend_keys(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` [Hq, L, D] over keys, values [H, n, D] where ``visible``, [L, n] or
    [Hq, L, n]."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = (query.double() @ keys.mT * sm_scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    # A query that sees nothing has lse = -inf; its differences are NaN, its probabilities zero.
    probabilities = (scores - lse[..., None]).exp().nan_to_num(nan=0.0)
    return probabilities @ values, lse


def replace_keys(keys: Tensor, tokens: Tensor, exact: Tensor) -> Tensor:
    """``keys`` [H, n, D] with ``exact`` [H, N, D] at ``tokens`` [H, N], as far as there are any."""
    keys = keys.clone()
    for h, own in enumerate(tokens):
        inside = (own >= 0) & (own < keys.shape[1])
        keys[h, own[inside].long()] = exact[h, inside].to(keys.dtype)
    return keys


def visible_tokens(q_len: int, packed: int, length: int, causal: bool) -> Tensor:
    """Mask [L, packed + length] of the packed tokens and the window's that each query sees."""
    visible = torch.ones(q_len, packed + length, dtype=torch.bool)
    if causal:  # query i is token length - L + i of the window and sees itself and all before it
        visible[:, packed:] = visible[:, packed:].tril(length - q_len)
    return visible


def attend(
    query: Tensor, packed: PackedKeys, window: Window, sm_scale: float, *, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Decode everything, then attend; see :func:`svdq.ops.attend`."""
    results = []
    for b in range(query.shape[0]):
        count = max(int(packed.cache_seqlens[b]) - packed.sink_tokens, 0)
        at = (packed.layout, packed.page_table[b], packed.sink_tokens, count)
        k, v = packed_keys(packed, b), unpack_values(packed.v_pages, *at)
        length = int(window.lens[b])
        k = torch.cat([k, window.keys[b, :, :length].double()], dim=1)
        v = torch.cat([v.double(), window.values[b, :, :length].double()], dim=1)
        visible = visible_tokens(query.shape[2], count, length, causal)
        if packed.token_slots is not None:
            valid = packed.token_slots[b, :, :count] < NO_SLOT
            group = query.shape[1] // k.shape[0]
            visible = visible.repeat(query.shape[1], 1, 1)
            visible[:, :, :count] &= valid.repeat_interleave(group, dim=0)[:, None]
            v = v.nan_to_num()  # of slots without a token
        results.append(attend_keys(query[b], k, v, visible, sm_scale))
    out, lse = (torch.stack(x) for x in zip(*results, strict=True))
    return out.to(query.dtype), _stored(lse, query)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys; see :func:`svdq.ops.merge`."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    # With both sets empty the shares are exp(-inf - -inf), which is NaN: zeros.
    shares = [(x.double() - lse).exp().nan_to_num(nan=0.0)[..., None] for x in (lse_a, lse_b)]
    out = shares[0] * out_a.double() + shares[1] * out_b.double()
    return out.to(out_a.dtype), _stored(lse, lse_a)
