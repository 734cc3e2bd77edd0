"""merge: attention over disjoint sets of keys becomes attention over their union."""

import pytest
import torch

from support import FLOAT_ERROR, ROUNDING, assert_same, assert_within, make_cache, make_layout
from svdq import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(out_a, lse_a, out_b, lse_b):
    """Compares with the reference; returns what the operator restrided.

    Weights are exponentials of float32 differences, off by u |lse| and a few roundings; they are
    convex, so errors are relative to the larger output. The result is rounded to its own dtype.
    """
    out, lse = ops.merge(out_a, lse_a, out_b, lse_b)
    assert (out.dtype, lse.dtype) == (out_a.dtype, torch.float32)
    expected_out, expected_lse = reference.merge(
        out_a.double(), lse_a.double(), out_b.double(), lse_b.double()
    )
    size = expected_lse.abs().where(expected_lse.isfinite(), 0.0)
    error = (8 + 2 * size) * FLOAT_ERROR
    reach = out_a.double().abs().maximum(out_b.double().abs())
    rounding = ROUNDING[out_a.dtype] * reach + 2.0**-25
    assert_within(out, expected_out, error[..., None] * reach + rounding)
    assert_within(lse, expected_lse, error)
    return out, lse


def random_part(shape, dtype, size=1.0):
    return torch.randn(shape).to(dtype), size * torch.randn(shape[:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 6, 3, 80), (1, 32, 1, 128), (3, 2, 5, 7)])
def test_merge(backend, dtype, shape):
    check(*random_part(shape, dtype), *random_part(shape, dtype))


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_any_size_of_lse(backend, size):
    shape = (2, 4, 3, 64)
    out, lse = check(
        *random_part(shape, torch.float32, size), *random_part(shape, torch.float32, size)
    )
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_parts(backend, dtype):
    shape = (1, 3, 2, 32)
    out, lse = random_part(shape, dtype)
    # The output of an empty part must not matter, not even NaN.
    for nothing in (torch.zeros(shape), torch.full(shape, torch.nan)):
        empty = nothing.to(dtype), torch.full(shape[:3], -torch.inf)
        for merged in (ops.merge(out, lse, *empty), ops.merge(*empty, out, lse)):
            assert_same(merged[0], out)
            assert_within(merged[1], lse, 2 * FLOAT_ERROR * lse.abs())
        both = ops.merge(*empty, *empty)
        assert_same(both[0], torch.zeros(shape, dtype=dtype))
        assert_same(both[1], empty[1])


def test_order_does_not_matter(backend):
    a, b = random_part((2, 3, 4, 64), torch.float32), random_part((2, 3, 4, 64), torch.float32)
    for got, expected in zip(ops.merge(*a, *b), ops.merge(*b, *a), strict=True):
        assert_within(got, expected, 4 * FLOAT_ERROR * float(expected.abs().amax()))


@pytest.mark.libraries
def test_strided_parts(backend):
    shape = (2, 3, 4, 64)
    a, b = random_part(shape, torch.float32), random_part(shape, torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*a, *b)]
    for got, expected in zip(ops.merge(*strided), ops.merge(*a, *b), strict=True):
        assert_same(got, expected)


def test_no_rows(backend):
    part = torch.empty(2, 3, 0, 64), torch.empty(2, 3, 0)
    out, lse = ops.merge(*part, *part)
    assert (out.shape, lse.shape) == ((2, 3, 0, 64), (2, 3, 0))


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_parts_of_a_cache_merge_to_the_whole(backend, rope):
    layout = make_layout(64, [4, 2], 2, rope)
    cache, _, _ = make_cache(layout, [150, 40], [20, 5], causal=False)
    query = torch.randn(2, 4, 3, 64)
    nothing = torch.zeros(2, dtype=torch.int32)
    whole = ops.attend(query, **cache.kwargs())
    packed = ops.attend(query, **cache.but(window_lens=nothing).kwargs())
    exact = ops.attend(query, **cache.but(cache_seqlens=nothing).kwargs())
    out, lse = check(*packed, *exact)
    # Probabilities, rounded to 1/65535 of a page's largest, are so relative to another maximum: in
    # 64 tokens of codes up to 15 and scales up to 1/2, at most 64 * 15 / 2 half steps of that.
    assert_within(out, whole[0], 64 * 15 / 2 / 2 / 65535)
    assert_within(lse, whole[1], 64 * FLOAT_ERROR * whole[1].abs())
