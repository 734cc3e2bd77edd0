"""Keys in pages, and attention over pages and the window."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from svdq.layout import NO_SLOT, PageLayout
from svdq.ops import NO_RULES, KeyCodec, LogitRules, PackedKeys, Window
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


def skipped_slots(packed: PackedKeys) -> int:
    """Leading slots of the pages that are in the window: sinks; gathered pages hold none."""
    return 0 if packed.token_slots is not None else packed.sink_tokens


def first_position(packed: PackedKeys, b: int) -> int:
    """Position of slot 0 of sequence b."""
    return 0 if packed.first_position is None else int(packed.first_position[b])


def packed_keys(packed: PackedKeys, b: int) -> Tensor:
    """Keys [H, n, D] float64 of the packed slots of sequence b after its sinks."""
    skip = skipped_slots(packed)
    count = max(int(packed.cache_seqlens[b]) - skip, 0)
    first = first_position(packed, b)
    codec, table = exact_codec(packed.codec.sequence(b)), packed.page_table[b]
    codes = unpack_codes(packed.k_pages, packed.layout, table, skip, count)
    if packed.token_slots is None:
        keys = decode_keys(codes, codec, packed.layout, skip + first)
    else:
        positions = packed.token_slots[b, :, :count].long() + first
        keys = torch.stack(
            [decode_keys(codes, codec, packed.layout, x)[h] for h, x in enumerate(positions)]
        )
    if packed.outlier_slots is None:
        return keys
    tokens = packed.outlier_slots[b] - skip
    return replace_keys(keys, tokens, packed.outlier_keys[b])


def append_window_(
    window_keys: Tensor, window_values: Tensor, keys: Tensor, values: Tensor, start: int
) -> None:
    """Copy new tokens into the window; see :func:`svdq.ops.append_window_`."""
    window_keys[:, start : start + keys.shape[1]] = keys
    window_values[:, start : start + values.shape[1]] = values


def attend_keys(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    sm_scale: float,
    rules: LogitRules = NO_RULES,
) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` [Hq, L, D] over keys, values [H, n, D] where ``visible``, [L, n] or
    [Hq, L, n], with the softcap and the sinks of ``rules``."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = query.double() @ keys.mT * sm_scale
    if rules.softcap:
        scores = rules.softcap * (scores / rules.softcap).tanh()
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    if rules.sinks is not None:
        lse = torch.logaddexp(lse, rules.sinks.double()[:, None])
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


def token_positions(packed: PackedKeys, b: int, length: int, last: int) -> Tensor:
    """Positions [H, n] of the packed tokens of sequence b and of its window's ``length`` tokens.

    ``last`` is that of the window's last token.
    """
    first, skip = first_position(packed, b), skipped_slots(packed)
    slots = torch.arange(skip, max(int(packed.cache_seqlens[b]), skip))
    slots = slots.expand(packed.layout.num_kv_heads, -1)
    if packed.token_slots is not None:
        slots = packed.token_slots[b, :, : slots.shape[1]].long()
    window = last - length + 1 + torch.arange(length)
    sinks = min(packed.sink_tokens, length)
    window[:sinks] = first + torch.arange(sinks)
    return torch.cat([first + slots, window.expand(len(slots), -1)], dim=1)


def visible_tokens(
    q_len: int,
    packed: PackedKeys,
    b: int,
    length: int,
    *,
    causal: bool,
    window_size: int = 0,
    query_position: Tensor | None = None,
) -> Tensor:
    """Mask [H, L, n] of the packed tokens of sequence b and of its window's ``length`` that each
    query sees."""
    count = max(int(packed.cache_seqlens[b]) - skipped_slots(packed), 0)
    visible = torch.ones(packed.layout.num_kv_heads, q_len, count + length, dtype=torch.bool)
    if causal:  # query i is token length - L + i of the window and sees itself and all before it
        visible[..., count:] = visible[..., count:].tril(length - q_len)
    if packed.token_slots is not None:
        visible[..., :count] &= (packed.token_slots[b, :, :count] < NO_SLOT)[:, None]
    if window_size:
        start = int(query_position[b])
        positions = token_positions(packed, b, length, start - 1 + (q_len if causal else 0))
        oldest = start + torch.arange(q_len) - window_size
        visible &= positions[:, None] > oldest[:, None]
    return visible


def attend(
    query: Tensor,
    packed: PackedKeys,
    window: Window,
    sm_scale: float,
    *,
    causal: bool = True,
    rules: LogitRules = NO_RULES,
    query_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode everything, then attend; see :func:`svdq.ops.attend`."""
    results = []
    group = query.shape[1] // packed.layout.num_kv_heads
    skip = skipped_slots(packed)
    for b in range(query.shape[0]):
        count = max(int(packed.cache_seqlens[b]) - skip, 0)
        at = (packed.layout, packed.page_table[b], skip, count)
        k, v = packed_keys(packed, b), unpack_values(packed.v_pages, *at)
        length = int(window.lens[b])
        k = torch.cat([k, window.keys[b, :, :length].double()], dim=1)
        v = torch.cat([v.double(), window.values[b, :, :length].double()], dim=1)
        visible = visible_tokens(
            query.shape[2],
            packed,
            b,
            length,
            causal=causal,
            window_size=rules.window_size,
            query_position=query_position,
        )
        if packed.token_slots is not None:
            v = v.nan_to_num()  # of slots without a token
        visible = visible.repeat_interleave(group, dim=0)
        results.append(attend_keys(query[b], k, v, visible, sm_scale, rules))
    out, lse = (torch.stack(x) for x in zip(*results, strict=True))
    return out.to(query.dtype), _stored(lse, query)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys; see :func:`svdq.ops.merge`."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    # With both sets empty the shares are exp(-inf - -inf), which is NaN: zeros.
    shares = [(x.double() - lse).exp().nan_to_num(nan=0.0)[..., None] for x in (lse_a, lse_b)]
    out = shares[0] * out_a.double() + shares[1] * out_b.double()
    return out.to(out_a.dtype), _stored(lse, lse_a)
