"""Hybrid layouts: keys coded by core channels before RoPE and tail channels after it."""

import pytest
import torch

from pack_bounds import check_codes
from refusals import check_refusal, strided
from support import (
    FLOAT_ERROR,
    assert_same,
    assert_within,
    make_cache,
    make_inv_freq,
    make_k_pages,
    make_keys,
    make_layout,
    page_count,
)
from svdq import ops, reference
from svdq.layout import PageLayout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HYBRID_LAYOUTS = {
    "mixed": make_layout(64, [4, 2, 1, 0], 2, "hybrid"),
    "rotated-mean": make_layout(64, [4, 2, 1, 0], 2, "hybrid", pre_bands=((0, 0, 0, 0),) * 2),
    "core-alone": PageLayout(64, ((0,) * 4,) * 2, "hybrid", pre_bands=((4, 8, 4, 8),) * 2),
    "all-channels-twice": make_layout(64, [2, 1], 2, "hybrid", pre_bands=((0, 0, 32, 32),) * 2),
    "heads-of-different-size": PageLayout(
        80,
        ((8, 0, 4, 8), (0, 0, 0, 0), (0, 12, 0, 0), (0, 0, 0, 0)),
        "hybrid",
        v_group_size=16,
        pre_bands=((0, 4, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (4, 0, 0, 8)),
    ),
}
# What the decoded core leaves for a tail is taken off the keys by PyTorch's own kernels.
PACKED_LAYOUTS = [
    pytest.param(name, marks=[pytest.mark.libraries] if layout.tail is not None else [])
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
    *fitted, post_mean = reference.fit_keys(
        every[:, -300:], layout, inv_freq, slot + num_tokens + 9
    )
    table = torch.randperm(page_count(slot + num_tokens) + 2, dtype=torch.int32)
    before = make_k_pages(layout, len(table))
    after = before.clone()
    where = (layout, table, slot)
    ops.pack_keys_(after, keys, *fitted, *where, inv_freq, slot + 9, post_mean)
    codes = ops.unpack_codes(after, *where, num_tokens)
    check_codes(codes, keys, (*fitted, post_mean), layout, inv_freq, slot + 9)
    reference.write_codes_(before, codes, *where)
    assert_same(after, before)


@pytest.mark.libraries
@pytest.mark.parametrize("dtype", DTYPES)
def test_hybrid_dtypes_and_appending(backend, dtype):
    """Pieces of any length at any slot, in every dtype."""
    layout = HYBRID_LAYOUTS["mixed"]
    inv_freq = make_inv_freq(64)
    keys = make_keys(2, 200, 64, inv_freq=inv_freq, position=100).to(dtype)
    *fitted, post_mean = reference.fit_keys(keys.float(), layout, inv_freq, 100)
    table = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    k_pages = make_k_pages(layout, 4)
    ends = [1, 2, 63, 64, 66, 128, 200]
    for start, end in zip([0, *ends], ends, strict=False):
        ops.pack_keys_(
            k_pages, keys[:, start:end], *fitted, layout, table, start, inv_freq, 100 + start,
            post_mean,
        )  # fmt: skip
    codes = ops.unpack_codes(k_pages, layout, table, 0, 200)
    check_codes(codes, keys, (*fitted, post_mean), layout, inv_freq, 100)


@pytest.mark.libraries
@pytest.mark.parametrize("name", HYBRID_LAYOUTS)
def test_unpack_hybrid_keys(backend, name):
    layout = HYBRID_LAYOUTS[name]
    heads, dim = layout.num_kv_heads, layout.head_dim
    inv_freq = make_inv_freq(48)
    *fitted, post_mean = reference.fit_keys(make_keys(heads, 300, dim), layout, inv_freq)
    table = torch.randperm(40, dtype=torch.int32)
    k_pages = make_k_pages(layout, 40)
    for slot, num_tokens, position in ((0, 1, 0), (63, 2, 5), (77, 1500, 100_000), (64, 64, -64)):
        where = (layout, table, slot, num_tokens, inv_freq, position)
        got = ops.unpack_keys(k_pages, *fitted, *where, post_mean)
        exact = (*fitted[:2], fitted[2].double())
        expected = reference.unpack_keys(k_pages, *exact, *where, post_mean)
        # Two parts, each rounded once or twice, and their sum.
        parts = expected.abs().amax() + 2 * fitted[2].abs().amax()
        assert_within(got, expected, 6 * FLOAT_ERROR * float(parts))
        codes = ops.unpack_codes(k_pages, *where[:4])
        assert_same(codes, reference.unpack_codes(k_pages, *where[:4]))


@pytest.mark.libraries
def test_residual_keys(backend):
    layout = HYBRID_LAYOUTS["mixed"]
    inv_freq = make_inv_freq(64)
    keys = make_keys(2, 2200, 64, inv_freq=inv_freq, position=9)
    *fitted, _ = reference.fit_keys(keys[:, :300], layout, inv_freq, 9)
    got = ops.residual_keys(keys, *fitted, layout, inv_freq, 9)
    expected = reference.residual_keys(keys, *fitted, layout, inv_freq, 9)
    # All but a few keys, whose codes lie on a boundary, have the reference's core.
    off = (got - expected).abs().amax(2) > 1e-4
    assert off.double().mean() < 1e-3
    half = ops.residual_keys(keys.bfloat16(), *fitted, layout, inv_freq, 9)
    assert half.dtype == torch.bfloat16
    assert (half - got).abs().mean() < 0.02
    assert ops.residual_keys(keys[:, :0], *fitted, layout, inv_freq, 9).shape == (2, 0, 64)


def operator_args(op, layout):
    """Right arguments for a hybrid layout."""
    if op == "attend":
        cache, _, _ = make_cache(layout, [130, 70], [5, 9])
        return {"query": torch.randn(2, 4, 2, 64), **cache.kwargs()}
    inv_freq = make_inv_freq(64)
    keys = make_keys(2, 70, 64, inv_freq=inv_freq)
    fitted = reference.fit_keys(keys, layout, inv_freq)
    args = dict(zip(("basis", "scale", "mean", "post_mean"), fitted, strict=True))
    args |= {"k_pages": make_k_pages(layout, 2), "layout": layout, "inv_freq": inv_freq, "slot": 3}
    args |= {"page_table": torch.tensor([1, 0], dtype=torch.int32)}
    return {**args, "keys": keys} if op == "pack_keys_" else {**args, "num_tokens": 70}


@pytest.mark.parametrize("op", ["pack_keys_", "unpack_keys", "attend"])
def test_what_hybrid_layouts_need(op):
    args = operator_args(op, HYBRID_LAYOUTS["mixed"])
    getattr(ops, op)(**args)
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
