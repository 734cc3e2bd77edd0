"""unpack_codes and unpack_keys against the reference; unpack_values: test_pack_values.py."""

import pytest
import torch

from pack_bounds import HYBRID_LAYOUTS
from support import (
    FLOAT_ERROR,
    assert_same,
    assert_within,
    make_inv_freq,
    make_k_pages,
    make_keys,
    make_layout,
)
from svdq import ops, reference

MIXED = [8, 4, 2, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("rope", "rotary_dim"), [("post", 0), ("pre", 64), ("pre", 24)], ids=["post", "pre", "partial"]
)
def test_unpack_keys(rope, rotary_dim):
    layout = make_layout(64, MIXED, 3, rope)
    inv_freq = make_inv_freq(rotary_dim) if rotary_dim else None
    codec = reference.fit_keys(make_keys(3, 300, 64), layout, inv_freq)
    table = torch.randperm(40, dtype=torch.int32)
    k_pages = make_k_pages(layout, 40)  # random codes: all that there are
    for slot, num_tokens, position in ((0, 1, 0), (63, 2, 5), (77, 1500, 100_000), (64, 64, -64)):
        where = (layout, table, slot, num_tokens)
        got = ops.unpack_keys(k_pages, codec, *where, position=position)
        exact = reference.exact_codec(codec)
        expected = reference.unpack_keys(k_pages, exact, *where, position=position)
        # Sums are taken in double and rounded once or, before they are rotated, twice.
        assert_within(got, expected, 3 * FLOAT_ERROR * float(expected.abs().amax()))
        codes = ops.unpack_codes(k_pages, *where)
        assert_same(codes, reference.unpack_codes(k_pages, *where))


@pytest.mark.libraries
@pytest.mark.parametrize("name", HYBRID_LAYOUTS)
def test_unpack_hybrid_keys(backend, name):
    layout = HYBRID_LAYOUTS[name]
    heads, dim = layout.num_kv_heads, layout.head_dim
    inv_freq = make_inv_freq(48)
    codec = reference.fit_keys(make_keys(heads, 300, dim), layout, inv_freq)
    table = torch.randperm(40, dtype=torch.int32)
    k_pages = make_k_pages(layout, 40)
    for slot, num_tokens, position in ((0, 1, 0), (63, 2, 5), (77, 1500, 100_000), (64, 64, -64)):
        where = (layout, table, slot, num_tokens)
        got = ops.unpack_keys(k_pages, codec, *where, position=position)
        exact = reference.exact_codec(codec)
        expected = reference.unpack_keys(k_pages, exact, *where, position=position)
        # Two parts, each rounded once or twice, and their sum.
        parts = expected.abs().amax() + 2 * codec.mean.abs().amax()
        assert_within(got, expected, 6 * FLOAT_ERROR * float(parts))
        codes = ops.unpack_codes(k_pages, *where)
        assert_same(codes, reference.unpack_codes(k_pages, *where))
