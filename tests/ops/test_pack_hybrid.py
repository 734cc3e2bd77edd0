"""Hybrid layouts: keys coded by core channels before RoPE and tail channels after it."""

import pytest
import torch

from pack_bounds import HYBRID_LAYOUTS, check_codes
from refusals import call, check_refusal, strided
from support import (
    assert_same,
    make_cache,
    make_inv_freq,
    make_k_pages,
    make_keys,
)
from svdq import ops, reference
from svdq.layout import pages_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Decoded pre-RoPE channels are taken off the keys by PyTorch's own kernels.
PACKED_LAYOUTS = [
    pytest.param(name, marks=[pytest.mark.libraries] if layout.post_part is not None else [])
    for name, layout in HYBRID_LAYOUTS.items()
]


@pytest.mark.parametrize("slot", [0, 63, 17])
@pytest.mark.parametrize("num_tokens", [1, 65, 4200])
@pytest.mark.parametrize("name", PACKED_LAYOUTS)
def test_hybrid_codes(backend, name, num_tokens, slot):
    layout = HYBRID_LAYOUTS[name]
    heads, dim = layout.num_kv_heads, layout.head_dim
    inv_freq = make_inv_freq(48)
    every = make_keys(heads, num_tokens + 300, dim, inv_freq=inv_freq, position=slot + 9)
    keys = every[:, :num_tokens]
    codec = reference.fit_keys(every[:, -300:], layout, inv_freq, slot + num_tokens + 9)
    table = torch.randperm(pages_of(slot + num_tokens) + 2, dtype=torch.int32)
    before = make_k_pages(layout, len(table))
    after = before.clone()
    where = (layout, table, slot)
    ops.pack_keys_(after, keys, codec, *where, position=slot + 9)
    codes = ops.unpack_codes(after, *where, num_tokens)
    check_codes(codes, keys, codec, layout, slot + 9)
    reference.write_codes_(before, codes, *where)
    assert_same(after, before)


@pytest.mark.libraries
@pytest.mark.parametrize("dtype", DTYPES)
def test_hybrid_dtypes_and_appending(backend, dtype):
    """Pieces of any length at any slot, in every dtype."""
    layout = HYBRID_LAYOUTS["mixed"]
    inv_freq = make_inv_freq(64)
    keys = make_keys(2, 200, 64, inv_freq=inv_freq, position=100).to(dtype)
    codec = reference.fit_keys(keys.float(), layout, inv_freq, 100)
    table = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    k_pages = make_k_pages(layout, 4)
    ends = [1, 2, 63, 64, 66, 128, 200]
    for start, end in zip([0, *ends], ends, strict=False):
        piece = keys[:, start:end]
        ops.pack_keys_(k_pages, piece, codec, layout, table, start, position=100 + start)
    codes = ops.unpack_codes(k_pages, layout, table, 0, 200)
    check_codes(codes, keys, codec, layout, 100)


@pytest.mark.libraries
def test_residual_keys(backend):
    layout = HYBRID_LAYOUTS["mixed"]
    inv_freq = make_inv_freq(64)
    keys = make_keys(2, 2200, 64, inv_freq=inv_freq, position=9)
    codec = reference.fit_keys(keys[:, :300], layout, inv_freq, 9)
    got = ops.residual_keys(keys, codec, layout, position=9)
    expected = reference.residual_keys(keys, codec, layout, position=9)
    # All but a few keys, whose codes lie on a boundary, have the reference's pre-RoPE codes.
    off = (got - expected).abs().amax(2) > 1e-4
    assert off.double().mean() < 1e-3
    half = ops.residual_keys(keys.bfloat16(), codec, layout, position=9)
    assert half.dtype == torch.bfloat16
    assert (half - got).abs().mean() < 0.02
    assert ops.residual_keys(keys[:, :0], codec, layout, position=9).shape == (2, 0, 64)


def operator_args(op, layout):
    """Right arguments for a hybrid layout."""
    if op == "attend":
        cache, _, _ = make_cache(layout, [130, 70], [5, 9])
        return {"query": torch.randn(2, 4, 2, 64), **cache.flat(), "layout": layout}
    inv_freq = make_inv_freq(64)
    keys = make_keys(2, 70, 64, inv_freq=inv_freq)
    args = reference.fit_keys(keys, layout, inv_freq).flat()
    args |= {"k_pages": make_k_pages(layout, 2), "layout": layout, "slot": 3}
    args |= {"page_table": torch.tensor([1, 0], dtype=torch.int32)}
    return {**args, "keys": keys} if op == "pack_keys_" else {**args, "num_tokens": 70}


@pytest.mark.parametrize("op", ["pack_keys_", "unpack_keys", "attend"])
def test_arguments_that_hybrid_layouts_need(op):
    args = operator_args(op, HYBRID_LAYOUTS["mixed"])
    call(op, args)
    right = args["post_mean"]
    for wrong, message in (
        (None, "needed"),
        (right[1:], r"\["),
        (right.half(), "Half"),
        (strided(right), "contiguous"),
    ):
        check_refusal(op, {**args, "post_mean": wrong}, "post_mean", message)
    check_refusal(op, {**args, "post_mean": right.to_sparse()}, "[Ss]parse")
    check_refusal(op, {**args, "post_mean": right.to("meta")}, "meta")
    check_refusal(op, {**args, "inv_freq": None}, "inv_freq", "needed")
    check_refusal(op, {**args, "inv_freq": make_inv_freq(66)}, "inv_freq", "33")
