"""pack_values_ and unpack_values: per-token groups of 2 and 4 bits, and values of 16 and 32."""

import pytest
import torch

from support import assert_same, assert_within, make_layout, make_v_pages
from svdq import ops, reference
from svdq.layout import PAGE_TOKENS, pages_of

# Codes are computed in float32: the difference, the reciprocal of the scale and the product are
# rounded, each by at most 2^-24 of the top code, or of it and the zero point in steps.
CODE_ERROR = 3 * 2.0**-24


def make_values(num_heads, num_tokens, head_dim, dtype=torch.float32):
    """Values whose tokens differ in size and centre."""
    values = torch.randn(num_heads, num_tokens, head_dim)
    size = torch.exp(torch.randn(num_heads, num_tokens, 1))
    return (values * size + torch.randn(num_heads, num_tokens, 1)).to(dtype)


def check_packed(v_pages, values, layout, table, slot):
    """Compares with the definition; returns the share of codes that rounding leaves a choice."""
    scale, zero, codes = reference.value_parts(v_pages, layout, table, slot, values.shape[1])
    expected_scale, expected_zero, exact = reference.quantize_values(values, layout)
    assert_same(scale, expected_scale)
    assert_same(zero, expected_zero)
    top = 2**layout.v_bits - 1
    step = expected_scale.double().clamp(min=2.0**-24)
    reach = top + expected_zero.double().abs() / step
    error = CODE_ERROR * reach.repeat_interleave(layout.v_group_size, dim=2)
    low, high = (exact - error).round().clamp(0, top), (exact + error).round().clamp(0, top)
    assert_within(codes, (low + high) / 2, (high - low) / 2)
    return float((low != high).double().mean())


CASES = {
    # name: v_bits, head_dim, group, num_tokens, slot
    "4-bit": (4, 64, 64, 4097, 0),
    "2-bit": (2, 64, 64, 4097, 0),
    "4-bit-groups": (4, 128, 32, 65, 63),
    "2-bit-groups": (2, 128, 16, 63, 1),
    "4-bit-dim-80": (4, 80, 80, 64, 64),
    "2-bit-dim-96": (2, 96, 48, 1, 63),
    "4-bit-dim-256": (4, 256, 64, 130, 7),
    "2-bit-dim-16": (2, 16, 16, 70, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("v_bits", "head_dim", "group", "num_tokens", "slot"), CASES.values(), ids=CASES
)
def test_packed_values(backend, v_bits, head_dim, group, num_tokens, slot, dtype):
    if num_tokens > 1000 and dtype != torch.float32:
        num_tokens = 100
    layout = make_layout(head_dim, [1], 2, v_bits=v_bits, v_group_size=group)
    values = make_values(2, num_tokens, head_dim, dtype)
    table = torch.randperm(pages_of(slot + num_tokens) + 1, dtype=torch.int32)
    before = make_v_pages(layout, len(table))
    after = before.clone()
    ops.pack_values_(after, values, layout, table, slot)
    assert check_packed(after, values, layout, table, slot) < 0.001
    decoded = ops.unpack_values(after, layout, table, slot, num_tokens)
    expected = reference.unpack_values(after, layout, table, slot, num_tokens)
    # Code times scale and the zero point are added in float32, with at most two roundings.
    assert_within(decoded, expected, 2**-23 * float(expected.abs().amax()))
    # Other slots keep their bytes.
    written = torch.zeros(len(table) * PAGE_TOKENS, dtype=torch.bool)
    written[slot : slot + num_tokens] = True
    old, new = (reference.value_parts(p, layout, table, 0, len(written)) for p in (before, after))
    for x, y in zip(old, new, strict=True):
        keep = [p[:, ~written].contiguous() for p in (x, y)]
        if x.dtype == torch.half:  # NaN is what unwritten slots hold
            keep = [p.view(torch.int16) for p in keep]
        assert_same(keep[1], keep[0])


def test_error_is_at_most_half_a_step(backend):
    layout = make_layout(128, [1], 2, v_bits=4, v_group_size=32)
    values = make_values(2, 300, 128)
    table = torch.arange(5, dtype=torch.int32)
    v_pages = make_v_pages(layout, 5)
    ops.pack_values_(v_pages, values, layout, table, 0)
    decoded = ops.unpack_values(v_pages, layout, table, 0, 300)
    grouped = values.unflatten(2, (-1, 32)).double()
    low, high = grouped.amin(3), grouped.amax(3)
    # Half a step, and what rounding the range to half moves its ends: 2^-11 of each number.
    allowed = (high - low) / 15 * (0.5 + 15 * 2**-11) + low.abs() * 2**-11 + 2.0**-24
    error = (decoded - values).abs().unflatten(2, (-1, 32))
    assert_within(error, torch.zeros_like(error), allowed[..., None])


EXTREMES = {
    "constant": torch.full((16,), 0.7),
    "zeros": torch.zeros(16),
    "largest": torch.tensor([-65504.0, 65504.0] * 8),
    "denormal-range": torch.linspace(0, 1e-8, 16),  # the scale is rounded to zero
    "small-range": 1 + torch.linspace(0, 1e-5, 16),
    "one-outlier": torch.cat([torch.zeros(15), torch.tensor([1000.0])]),
}


@pytest.mark.parametrize("v_bits", [2, 4])
@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
def test_extreme_values(backend, values, v_bits):
    layout = make_layout(16, [1], v_bits=v_bits)
    values = values.expand(1, 3, 16).contiguous()
    table = torch.zeros(1, dtype=torch.int32)
    v_pages = make_v_pages(layout, 1)
    ops.pack_values_(v_pages, values, layout, table, 5)
    check_packed(v_pages, values, layout, table, 5)
    decoded = ops.unpack_values(v_pages, layout, table, 5, 3)
    assert decoded.isfinite().all()
    reach = float(values.amax() - values.amin())
    rounding = 2**-10 * float(values.abs().amax()) + 2.0**-23
    step = reach / (2**v_bits - 1)
    assert_within(decoded, values, step * 0.51 + rounding)


@pytest.mark.parametrize(
    ("v_bits", "dtype"), [(16, torch.bfloat16), (16, torch.float16), (32, torch.float32)]
)
@pytest.mark.parametrize(("num_tokens", "slot"), [(4097, 0), (1, 63), (130, 63), (0, 5)])
def test_full_values(backend, v_bits, dtype, num_tokens, slot):
    layout = make_layout(80, [1], 2, v_bits=v_bits)
    values = make_values(2, num_tokens, 80, dtype)
    table = torch.randperm(pages_of(slot + num_tokens), dtype=torch.int32)
    v_pages = torch.full_like(make_v_pages(layout, len(table), dtype), 7.0)
    ops.pack_values_(v_pages, values, layout, table, slot)
    every = ops.unpack_values(v_pages, layout, table, 0, len(table) * PAGE_TOKENS)
    expected = torch.full_like(every, 7.0)
    expected[:, slot : slot + num_tokens] = values.float()
    assert_same(every, expected)


@pytest.mark.parametrize("v_bits", [2, 4, 32])
def test_strided_values_and_appends(backend, v_bits):
    """[T, H, D] as projections leave them, in pieces, equals one contiguous tensor."""
    layout = make_layout(64, [1], 3, v_bits=v_bits)
    values = make_values(3, 200, 64).transpose(0, 1).contiguous().transpose(0, 1)
    table = torch.randperm(4, dtype=torch.int32)
    whole, pieces = make_v_pages(layout, 4), make_v_pages(layout, 4)
    ops.pack_values_(whole, values.contiguous(), layout, table, 0)
    ends = [1, 2, 5, 63, 65, 128, 200]
    for start, end in zip([0, *ends], ends, strict=False):
        ops.pack_values_(pieces, values[:, start:end], layout, table, start)
    got, expected = (ops.unpack_values(p, layout, table, 0, 200) for p in (pieces, whole))
    assert_same(got, expected)


def test_results_do_not_depend_on_threads(num_threads):
    layout = make_layout(64, [1], 3)
    values = make_values(3, 1000, 64)
    table = torch.arange(16, dtype=torch.int32)
    pages = [make_v_pages(layout, 16) for _ in range(3)]
    for n, v_pages in enumerate(pages):
        num_threads(n + 1)
        ops.pack_values_(v_pages, values, layout, table, 5)
        assert_same(v_pages, pages[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_append_window(dtype):
    keys, values = make_values(2, 5, 64, dtype), make_values(2, 5, 64, dtype)
    rows = torch.full((2, 2, 9, 64), 7.0, dtype=dtype)
    expected = rows.clone()
    ops.append_window_(rows[0], rows[1], keys, values, 3)
    expected[0, :, 3:8], expected[1, :, 3:8] = keys, values
    assert_same(rows, expected)
    strided = keys.transpose(0, 1).contiguous().transpose(0, 1)
    ops.append_window_(rows[0], rows[1], strided[:, :2], values[:, :2], 7)
    expected[0, :, 7:], expected[1, :, 7:] = keys[:, :2], values[:, :2]
    assert_same(rows, expected)
    ops.append_window_(rows[0], rows[1], keys[:, :0], values[:, :0], 9)
    assert_same(rows, expected)
