"""pack_keys_: codes, the bytes around them, and the error of decoded keys."""

from dataclasses import replace

import pytest
import torch

from pack_bounds import check_codes
from support import (
    assert_same,
    assert_within,
    make_inv_freq,
    make_k_pages,
    make_keys,
    make_layout,
)
from svdq import _C, ops, reference
from svdq.layout import WIDTHS, PageLayout, pages_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fit(keys, layout, inv_freq=None, position=0):
    """The codec by the reference, without dropping anything."""
    mean, components, _ = reference.fit_basis(keys, inv_freq, position)
    return reference.fit_quantizer(
        keys, mean, components, layout, inv_freq=inv_freq, position=position
    )


MIXED = [8, 4, 2, 1, 1, 0, 0, 0]
CASES = {
    # name: head_dim, schedule, rope, rotary_dim, num_tokens, slot
    "post-64": (64, MIXED, "post", 0, 4097, 0),
    "pre-64": (64, MIXED, "pre", 64, 4097, 0),
    "paper-1.25": (128, [4, 4, 2, 0, 0, 0, 0, 0], "pre", 128, 65, 0),
    "paper-2.25": (128, [8, 4, 4, 2, 0, 0, 0, 0], "pre", 128, 64, 64),
    "one-token": (64, MIXED, "pre", 64, 1, 63),
    "63-tokens": (96, MIXED, "post", 0, 63, 1),
    "65-tokens": (80, MIXED, "pre", 80, 65, 0),
    "across-pages": (128, MIXED, "post", 0, 130, 63),
    "partial-rotary": (80, MIXED, "pre", 32, 200, 17),
    "head-dim-256": (256, MIXED, "pre", 256, 100, 5),
    "head-dim-16": (16, [4], "pre", 16, 70, 0),
    "8-bit": (64, [8, 0], "post", 0, 70, 3),
    "4-bit": (64, [4], "post", 0, 70, 3),
    "2-bit": (64, [2], "pre", 64, 70, 3),
    "1-bit": (64, [1], "post", 0, 70, 3),
}


@pytest.mark.parametrize(
    ("head_dim", "schedule", "rope", "rotary_dim", "num_tokens", "slot"), CASES.values(), ids=CASES
)
def test_codes(backend, head_dim, schedule, rope, rotary_dim, num_tokens, slot):
    layout = make_layout(head_dim, schedule, 2, rope)
    inv_freq = make_inv_freq(rotary_dim) if rotary_dim else None
    keys = make_keys(2, num_tokens, head_dim, inv_freq=inv_freq, position=slot + 9)
    # Fitted to other keys: some are out of range.
    codec = replace(fit(make_keys(2, 300, head_dim), layout), inv_freq=inv_freq)
    table = torch.randperm(pages_of(slot + num_tokens) + 2, dtype=torch.int32)
    before = make_k_pages(layout, len(table))
    after = before.clone()
    where = (layout, table, slot)
    ops.pack_keys_(after, keys, codec, *where, position=slot + 9)
    codes = ops.unpack_codes(after, *where, num_tokens)
    check_codes(codes, keys, codec, layout, slot + 9)
    # Writing these codes the plain way gives the same bytes: nothing else has changed.
    reference.write_codes_(before, codes, *where)
    assert_same(after, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_dtypes(backend, dtype, rope):
    layout = make_layout(64, MIXED, 3, rope)
    inv_freq = make_inv_freq(64) if rope == "pre" else None
    keys = make_keys(3, 100, 64, inv_freq=inv_freq).to(dtype)
    codec = fit(keys, layout, inv_freq)
    table = torch.arange(2, dtype=torch.int32)
    k_pages = make_k_pages(layout, 2)
    ops.pack_keys_(k_pages, keys, codec, layout, table, 0)
    check_codes(ops.unpack_codes(k_pages, layout, table, 0, 100), keys, codec, layout)


def test_strided_keys(backend):
    """Keys as a model makes them, [T, H, D] seen as [H, T, D], and a head that is used twice."""
    layout = make_layout(64, MIXED, 3)
    projected = make_keys(3, 90, 64).transpose(0, 1).contiguous()
    table = torch.arange(2, dtype=torch.int32)
    for keys in (
        projected[4:84].transpose(0, 1),
        projected[:, :1].transpose(0, 1).expand(3, -1, -1),
    ):
        assert not keys.is_contiguous()
        codec = fit(keys, layout)
        pages = torch.zeros(2, 2, layout.k_page_bytes, dtype=torch.uint8)
        ops.pack_keys_(pages[0], keys, codec, layout, table, 0)
        ops.pack_keys_(pages[1], keys.contiguous(), codec, layout, table, 0)
        assert_same(pages[0], pages[1])


def test_heads_of_different_size(backend):
    bands = ((8, 0, 4, 8), (0, 0, 0, 0), (0, 12, 0, 0), (0, 0, 4, 32))
    layout = PageLayout(64, bands, "post")
    keys = make_keys(4, 100, 64)
    codec = fit(keys, layout)
    table = torch.tensor([1, 0], dtype=torch.int32)
    k_pages = make_k_pages(layout, 2)
    ops.pack_keys_(k_pages, keys, codec, layout, table, 0)
    check_codes(ops.unpack_codes(k_pages, layout, table, 0, 100), keys, codec, layout)
    decoded = ops.unpack_keys(k_pages, codec, layout, table, 0, 100)
    assert_within(decoded[1], codec.mean[1].expand(100, -1))  # nothing but the mean


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_appending_equals_packing_at_once(backend, rope):
    """Pieces of any length at any slot, with one basis, as tokens leave the window."""
    layout = make_layout(64, MIXED, 2, rope)
    inv_freq = make_inv_freq(64) if rope == "pre" else None
    keys = make_keys(2, 300, 64, inv_freq=inv_freq, position=100)
    codec = fit(keys, layout, inv_freq, 100)
    table = torch.randperm(5, dtype=torch.int32)
    pages = [make_k_pages(layout, 5) for _ in range(2)]
    ops.pack_keys_(pages[0], keys, codec, layout, table, 0, position=100)
    ends = [1, 2, 63, 64, 66, 128, 192, 200, 300]
    for start, end in zip([0, *ends], ends, strict=False):
        piece = keys[:, start:end]
        ops.pack_keys_(pages[1], piece, codec, layout, table, start, position=100 + start)
    codes = [ops.unpack_codes(p, layout, table, 0, 300) for p in pages]
    if rope == "post":
        assert_same(codes[0], codes[1])
    check_codes(codes[1], keys, codec, layout, 100)


def test_no_tokens(backend):
    layout = make_layout(64, MIXED, 2)
    codec = fit(make_keys(2, 100, 64), layout)
    before = make_k_pages(layout, 1)
    after = before.clone()
    table = torch.zeros(1, dtype=torch.int32)
    ops.pack_keys_(after, torch.empty(2, 0, 64), codec, layout, table, 64)
    assert_same(after, before)
    assert ops.unpack_codes(after, layout, table, 5, 0).shape == (0, layout.rank)
    assert ops.unpack_keys(after, codec, layout, table, 5, 0).shape == (2, 0, 64)


def test_keys_far_outside_the_range_get_the_end_codes(backend):
    layout = make_layout(64, [8, 4, 2, 1], 1)
    keys = make_keys(1, 100, 64)
    codec = fit(keys, layout)
    away = 1e30 * codec.basis[0].float()
    far = torch.stack([codec.mean + away, codec.mean - away], dim=1)
    table = torch.zeros(1, dtype=torch.int32)
    k_pages = make_k_pages(layout, 1)
    ops.pack_keys_(k_pages, far, codec, layout, table, 0)
    codes = ops.unpack_codes(k_pages, layout, table, 0, 2)
    assert codes[:, 0].tolist() == [255, 0]


def test_scale_zero_decodes_to_the_mean(backend):
    layout = make_layout(64, [8, 4, 2, 1], 1)
    keys = torch.randn(1, 1, 64).expand(1, 70, 64).contiguous()
    codec = replace(fit(keys, layout), scale=torch.zeros(64))
    table = torch.arange(2, dtype=torch.int32)
    k_pages = make_k_pages(layout, 2)
    ops.pack_keys_(k_pages, keys, codec, layout, table, 0)
    decoded = ops.unpack_keys(k_pages, codec, layout, table, 0, 70)
    assert_within(decoded, codec.mean[:, None].expand(1, 70, 64))


@pytest.mark.libraries
@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_at_most_half_a_step(backend, width):
    """With all channels coded over their full range, a key is off by half a scale along each."""
    layout = make_layout(64, [width], 2)
    keys = make_keys(2, 500, 64)
    mean, components, _ = ops.fit_basis(keys)
    codec = ops.fit_quantizer(keys, mean, components, layout, clip=False)
    table = torch.arange(8, dtype=torch.int32)
    k_pages = make_k_pages(layout, 8)
    ops.pack_keys_(k_pages, keys, codec, layout, table, 0)
    decoded = ops.unpack_keys(k_pages, codec, layout, table, 0, 500)
    scale = codec.scale.view(2, 64).double()
    # The basis is orthonormal up to bfloat16 (2^-9 a component), which the latents are relative to.
    allowed = (scale.square().sum(1) / 4).sqrt()
    rounding = 2**-8 * (keys - mean[:, None]).norm(dim=2).amax(1)
    assert_within((decoded - keys).norm(dim=2), torch.zeros(2, 500), (allowed + rounding)[:, None])


def test_backends_write_the_same_codes():
    """Byte for byte where they fuse multiply and add alike, else up to latents on a boundary."""
    layout = make_layout(96, MIXED, 2, "pre")
    inv_freq = make_inv_freq(96)
    keys = make_keys(2, 700, 96, inv_freq=inv_freq)
    codec = fit(keys, layout, inv_freq)
    table = torch.arange(11, dtype=torch.int32)
    packed = {}
    before = _C.backend()
    for name in _C.backends():
        _C.set_backend(name)
        packed[name] = torch.zeros(11, layout.k_page_bytes, dtype=torch.uint8)
        ops.pack_keys_(packed[name], keys, codec, layout, table, 0)
    _C.set_backend(before)
    if {"avx512", "avx2"} <= packed.keys():
        assert_same(packed["avx512"], packed["avx2"])
    first = next(iter(packed.values()))
    for pages in packed.values():
        assert (pages != first).double().mean() < 1e-3


def test_results_do_not_depend_on_threads(num_threads):
    layout = make_layout(64, MIXED, 3)
    keys = make_keys(3, 3000, 64)
    codec = fit(keys[:, :300], layout)
    table = torch.arange(47, dtype=torch.int32)
    pages = torch.zeros(2, 47, layout.k_page_bytes, dtype=torch.uint8)
    for n in (1, 2):
        num_threads(n)
        ops.pack_keys_(pages[n - 1], keys, codec, layout, table, 0)
    assert_same(pages[0], pages[1])
