"""pack_values_ and unpack_values: rotated values of 2, 3 and 4 bits, and exact ones."""

import pytest
import torch

from support import assert_same, assert_within, make_layout, make_v_pages
from svdq import _C, ops, reference
from svdq.layout import PAGE_TOKENS, pages_of

U = 2.0**-24  # half a unit in the last place of 1
# The byte of a scale has three bits of mantissa: rounding it moves a scale by at most this share.
SCALE_ERROR = 2.0**-4
LEAST_SCALE = 2.0**-14  # of those with three bits


def make_values(num_heads, num_tokens, head_dim, dtype=torch.float32):
    """Values whose tokens differ in size and centre."""
    values = torch.randn(num_heads, num_tokens, head_dim)
    size = torch.exp(torch.randn(num_heads, num_tokens, 1))
    return (values * size + torch.randn(num_heads, num_tokens, 1)).to(dtype)


def code_error(steps, head_dim, v_bits):
    """Bound on an operator's errors of codes before rounding, in steps.

    Every stage of the rotation rounds numbers that are at most the row's length L, up to a common
    factor: a stage moves a number by at most L u. There is one stage for each doubling, one for a
    reflection with its sum of head_dim / block numbers, and one each for sign and norm. The step is
    value_step * L / sqrt(D), its D squares rounded at most D / 16 + 8 times; it divides once.
    """
    block = head_dim & -head_dim
    stages = block.bit_length() + head_dim // block + 2
    length = head_dim**0.5 / _C.format.value_step(v_bits)  # in steps
    return U * (stages * length + (head_dim / 16 + 12) * (steps.abs() + 2**v_bits))


def check_packed(v_pages, values, layout, table, slot):
    """Compares with the definition; returns the share of codes that rounding leaves a choice."""
    scales, codes = reference.value_parts(v_pages, layout, table, slot, values.shape[1])
    choices = []
    for h, v_bits in enumerate(layout.v_bits):
        top = 2**v_bits - 1
        _, _, steps = reference.quantize_values(values[h], v_bits)
        error = code_error(steps, layout.head_dim, v_bits)
        low, high = (steps - error).round().clamp(0, top), (steps + error).round().clamp(0, top)
        assert_within(codes[h], (low + high) / 2, (high - low) / 2)
        choices.append((low != high).double().mean())
        # The scale that makes the codes that were chosen unbiased, before it is rounded.
        rotated = values[h].double() @ reference.rotation(layout.head_dim).T
        square, product = rotated.square().sum(1), (rotated * (codes[h] - top / 2)).sum(1)
        scale = torch.where(square > 0, square / product, 0.0)
        relative = 2 * layout.head_dim * U
        bounds = [reference.scale_bytes(scale * (1 + sign * relative)) for sign in (-1, 1)]
        assert ((bounds[0] <= scales[h]) & (scales[h] <= bounds[1])).all()
    return float(torch.stack(choices).max())


CASES = {
    # name: v_bits, head_dim, num_tokens, slot
    "4-bit": (4, 64, 4097, 0),
    "3-bit": (3, 64, 4097, 0),
    "2-bit": (2, 64, 4097, 0),
    "4-bit-dim-128": (4, 128, 65, 63),
    "3-bit-dim-128": (3, 128, 63, 1),
    "heads-differ": ((3, 2), 128, 63, 1),
    "heads-differ-dim-48": ((4, 3), 48, 70, 60),
    "4-bit-dim-80": (4, 80, 64, 64),
    "3-bit-dim-80": (3, 80, 64, 61),
    "2-bit-dim-96": (2, 96, 1, 63),
    "4-bit-dim-256": (4, 256, 130, 7),
    "3-bit-dim-512": (3, 512, 130, 7),
    "2-bit-dim-16": (2, 16, 70, 0),
    "3-bit-dim-16": (3, 16, 70, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("v_bits", "head_dim", "num_tokens", "slot"), CASES.values(), ids=CASES)
def test_packed_values(backend, v_bits, head_dim, num_tokens, slot, dtype):
    if num_tokens > 1000 and dtype != torch.float32:
        num_tokens = 100
    layout = make_layout(head_dim, [1], 2, v_bits=v_bits)
    values = make_values(2, num_tokens, head_dim, dtype)
    table = torch.randperm(pages_of(slot + num_tokens) + 1, dtype=torch.int32)
    before = make_v_pages(layout, len(table))
    after = before.clone()
    ops.pack_values_(after, values, layout, table, slot)
    assert check_packed(after, values, layout, table, slot) < 0.005
    decoded = ops.unpack_values(after, layout, table, slot, num_tokens)
    expected = reference.unpack_values(after, layout, table, slot, num_tokens)
    # The stages of the rotation, as in code_error.
    stages = head_dim.bit_length() + head_dim // (head_dim & -head_dim) + 3
    assert_within(decoded, expected, stages * U * expected.norm(dim=2, keepdim=True))
    # Other slots keep their bytes.
    written = torch.zeros(len(table) * PAGE_TOKENS, dtype=torch.bool)
    written[slot : slot + num_tokens] = True
    old, new = (reference.value_parts(p, layout, table, 0, len(written)) for p in (before, after))
    for x, y in zip(old, new, strict=True):
        assert_same(y[:, ~written].contiguous(), x[:, ~written].contiguous())


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256, 496])
def test_rotation_is_orthogonal(head_dim):
    rotation = reference.rotation(head_dim)
    assert_within(rotation @ rotation.T, torch.eye(head_dim).double(), 1e-12)


@pytest.mark.parametrize("v_bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_packed_values_are_unbiased_along_the_token(backend, v_bits, head_dim):
    """<x, decoded> / <x, x> is 1 up to the rounding of the scale, and 1 on average."""
    layout = make_layout(head_dim, [1], 2, v_bits=v_bits)
    values = make_values(2, 2000, head_dim)
    table = torch.arange(pages_of(2000), dtype=torch.int32)
    v_pages = make_v_pages(layout, len(table))
    ops.pack_values_(v_pages, values, layout, table, 0)
    decoded = ops.unpack_values(v_pages, layout, table, 0, 2000).double()
    exact = values.double()
    share = (exact * decoded).sum(2) / exact.square().sum(2)
    scales = reference.scales_of(reference.value_parts(v_pages, layout, table, 0, 2000)[0])
    assert (scales >= LEAST_SCALE).all()
    assert_within(share, torch.ones_like(share), SCALE_ERROR + 4 * head_dim * U)
    # Scales spread over octaves, so that the rounding is of either sign; 5 standard errors.
    assert_within(share.mean(), torch.ones(()), float(5 * share.std() / share.numel() ** 0.5))
    # Least squares would lose the variance that codes lose, along every token.
    error = (decoded - exact).square().sum(2) / exact.square().sum(2)
    assert float(error.mean()) < {2: 0.19, 3: 0.055, 4: 0.018}[v_bits]


EXTREMES = {
    "constant": torch.full((16,), 0.7),
    "zeros": torch.zeros(16),
    "largest": torch.tensor([-65504.0, 65504.0] * 8),
    "denormal-range": torch.linspace(0, 1e-8, 16),  # the scale is rounded to zero
    "small-range": 1 + torch.linspace(0, 1e-5, 16),
    "one-outlier": torch.cat([torch.zeros(15), torch.tensor([1000.0])]),
    "one-rotated-number": reference.rotation(16)[3].float() * 100,
    "largest-rotated-number": reference.rotation(16)[3].float() * 4 * 65504,
}


@pytest.mark.parametrize("v_bits", [2, 3, 4])
@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
def test_extreme_values(backend, values, v_bits):
    layout = make_layout(16, [1], v_bits=v_bits)
    values = values.expand(1, 3, 16).contiguous()
    table = torch.zeros(1, dtype=torch.int32)
    v_pages = make_v_pages(layout, 1)
    ops.pack_values_(v_pages, values, layout, table, 5)
    decoded = ops.unpack_values(v_pages, layout, table, 5, 3).double()
    assert decoded.isfinite().all()
    scales, codes = reference.value_parts(v_pages, layout, table, 5, 3)
    # No scale is larger than the largest number; what is far below the least one becomes zero.
    assert (reference.scales_of(scales) <= 61440).all()
    length = float(values[0, 0].double().norm())
    assert (scales > 0).all() if length > 1e-4 else (scales == 0).all()
    top = 2**v_bits - 1
    if 0 < length < 65504:
        share = (values * decoded).sum() / values.double().square().sum()
        assert length < 1e-4 or abs(share - 1) <= SCALE_ERROR + 64 * U
        assert ((codes - top / 2).abs() <= top / 2).all()


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


@pytest.mark.parametrize("v_bits", [2, 3, 4, 32])
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
