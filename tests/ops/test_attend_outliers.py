"""Outliers: keys held exact in addition to their codes, and the errors that choose them."""

import pytest
import torch

from attend_bounds import expect
from refusals import call, check_refusal, strided
from support import (
    FLOAT_ERROR,
    assert_same,
    assert_within,
    make_cache,
    make_inv_freq,
    make_k_pages,
    make_keys,
    make_layout,
)
from svdq import ops, reference
from svdq.layout import NO_SLOT, PageLayout, pages_of

MIXED = [8, 4, 2, 1, 1, 0, 0, 0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROPES = ["pre", "post", "hybrid"]
# Their packing takes decoded pre-RoPE channels off the keys by PyTorch's own kernels.
HYBRIDS = [
    pytest.param(name, marks=pytest.mark.libraries)
    for name in ("hybrid", "rotated-mean", "pre-alone")
]


def with_outliers(cache, count, dtype=torch.float32, unused=2):
    """The cache with random outlier keys at random slots, sinks' and those past the end too."""
    batch, heads = len(cache.cache_seqlens), cache.layout.num_kv_heads
    slots = torch.full((batch, heads, count + unused), NO_SLOT, dtype=torch.int32)
    for b in range(batch):
        reach = int(cache.cache_seqlens[b]) + 9
        for h in range(heads):
            own = torch.randperm(reach)[: count - h].sort().values
            slots[b, h, : len(own)] = own
    keys = torch.randn(*slots.shape, cache.layout.head_dim).to(dtype)
    keys[slots == NO_SLOT] = torch.nan  # nothing may read them
    return cache.but(outlier_slots=slots, outlier_keys=keys)


def check(cache, query):
    expected = expect(cache, query)
    out, lse = ops.attend(query, **cache.kwargs())
    assert_within(out, expected.out, expected.out_error)
    assert_within(lse, expected.lse, expected.lse_error)
    return out


@pytest.mark.parametrize("q_len", [1, 3, 17])
@pytest.mark.parametrize("rope", ROPES)
def test_scores_are_those_of_the_exact_keys(backend, rope, q_len):
    layout = make_layout(64, MIXED, 2, rope)
    options = {"first_positions": [0, 50, 3], "sink_tokens": 4}
    cache, _, _ = make_cache(layout, [130, 0, 64], [20, 17, 30], **options)
    query = torch.randn(3, 4, q_len, 64)
    out = check(with_outliers(cache, 7), query)
    # The check says something: the packed keys alone give another result.
    assert not torch.allclose(out, ops.attend(query, **cache.kwargs())[0], atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "v_bits", "q_len"),
    [(16, 4, 1), (80, 2, 1), (96, 32, 2), (128, 16, 5), (256, 4, 1), (512, 4, 1), (512, 4, 9)],
)
def test_every_shape(backend, head_dim, v_bits, q_len, dtype):
    layout = make_layout(head_dim, [4, 2, 0, 0], 1, "hybrid", v_bits=v_bits)
    cache, _, _ = make_cache(layout, [150], [20], v_dtype=torch.bfloat16 if v_bits == 16 else None)
    check(with_outliers(cache, 5, dtype), torch.randn(1, 3, q_len, head_dim).to(dtype))


@pytest.mark.parametrize("q_len", [1, 9])
@pytest.mark.parametrize("v_bits", [4, 32])
def test_every_token_an_outlier(backend, v_bits, q_len):
    layout = make_layout(64, [4, 2], 2, v_bits=v_bits)
    cache, _, _ = make_cache(layout, [200], [20])
    slots = torch.arange(200, dtype=torch.int32).expand(1, 2, -1).contiguous()
    cache = cache.but(outlier_slots=slots, outlier_keys=torch.randn(1, 2, 200, 64))
    check(cache, torch.randn(1, 4, q_len, 64))


def test_over_many_splits(backend):
    layout = make_layout(64, [4, 4, 2, 0, 0, 0, 0, 0], 1, "post")
    cache, _, _ = make_cache(layout, [4250, 40], [70, 9])
    check(with_outliers(cache, 25), torch.randn(2, 2, 1, 64))


@pytest.mark.parametrize("count", [0, 3])
def test_lists_without_outliers(backend, count):
    cache, _, _ = make_cache(make_layout(64, [4, 2], 2), [150], [20])
    none = {
        "outlier_slots": torch.full((1, 2, count), NO_SLOT, dtype=torch.int32),
        "outlier_keys": torch.full((1, 2, count, 64), torch.nan),
    }
    query = torch.randn(1, 4, 1, 64)
    got = ops.attend(query, **cache.but(**none).kwargs())
    for x, expected in zip(got, ops.attend(query, **cache.kwargs()), strict=True):
        assert_same(x, expected)


def test_outliers_alone_make_attention_exact(backend):
    """With its own keys as outliers a sequence is attended to as if nothing were quantized."""
    layout = make_layout(64, [1], 2, v_bits=32)
    cache, keys, values = make_cache(layout, [100], [20])
    slots = torch.arange(100, dtype=torch.int32).expand(1, 2, -1).contiguous()
    query = torch.randn(1, 4, 1, 64)
    cache = cache.but(outlier_slots=slots, outlier_keys=keys[0][None].contiguous())
    out, _ = ops.attend(query, **cache.kwargs())
    every_key = torch.cat([keys[0], cache.window_keys[0, :, :20]], dim=1)
    every_value = torch.cat([values[0], cache.window_values[0, :, :20]], dim=1)
    seen = torch.ones(1, 120, dtype=torch.bool)
    exact, _ = reference.attend_keys(query[0], every_key, every_value, seen, 64**-0.5)
    assert_within(out[0], exact, 1e-5 * float(every_value.abs().amax()))


def test_wrong_outliers():
    cache, _, _ = make_cache(make_layout(64, [4, 2], 2), [130, 70], [5, 9])
    cache = with_outliers(cache, 5)
    args = {"query": torch.randn(2, 4, 2, 64), **cache.flat(), "layout": cache.layout}
    slots, keys = cache.outlier_slots, cache.outlier_keys

    def spoiled(at, value):
        wrong = slots.clone()
        wrong[at] = value
        return wrong

    for wrong, message in (
        (slots.long(), "Long"),
        (slots[:, :1].contiguous(), r"\["),
        (strided(slots), "contiguous"),
        (spoiled((1, 1, 0), -1), "-1"),
        (spoiled((0, 1, 2), int(slots[0, 1, 1])), "ascend"),
        (slots.flip(2), "ascend"),
    ):
        check_refusal("attend", {**args, "outlier_slots": wrong}, "outlier_slots", message)
    for wrong, message in (
        (keys.double(), "Double"),
        (keys[:, :, 1:].contiguous(), r"\["),
        (strided(keys), "contiguous"),
        (keys[..., :32].contiguous(), r"\["),
    ):
        check_refusal("attend", {**args, "outlier_keys": wrong}, "outlier_keys", message)
    for name in ("outlier_slots", "outlier_keys"):
        check_refusal("attend", {**args, name: None}, "together")


@pytest.mark.parametrize("num_tokens", [0, 1, 70, 2300])
@pytest.mark.parametrize("slot", [0, 37])
@pytest.mark.parametrize("rope", ["pre", "post", "different", *HYBRIDS])
def test_errors_of_decoded_keys(backend, rope, slot, num_tokens):
    none = (0, 0, 0, 0)
    layout = {
        "rotated-mean": make_layout(64, [4, 2, 1, 0], 2, "hybrid", pre_bands=(none, none)),
        "pre-alone": PageLayout(64, (none, none), "hybrid", pre_bands=((4, 8, 4, 8),) * 2),
        "different": PageLayout(64, (none, (0, 4, 0, 8)), "post"),
    }.get(rope) or make_layout(64, MIXED, 2, rope)
    inv_freq = None if layout.rope == "post" else make_inv_freq(48)
    every = make_keys(2, num_tokens + 300, 64, inv_freq=inv_freq, position=9 - 300)
    keys = every[:, 300:]
    codec = reference.fit_keys(every[:, :300], layout, inv_freq, 9 - 300)
    table = torch.randperm(pages_of(slot + num_tokens) + 1, dtype=torch.int32)
    where = (layout, table, slot)
    k_pages, plain = (make_k_pages(layout, len(table)) for _ in range(2))
    plain.copy_(k_pages)
    errors = torch.full((2, num_tokens), torch.nan)
    ops.pack_keys_(k_pages, keys, codec, *where, position=9, errors=errors)
    ops.pack_keys_(plain, keys, codec, *where, position=9)
    assert_same(k_pages, plain)
    exact = reference.exact_codec(codec)
    decoded = reference.unpack_keys(k_pages, exact, *where, num_tokens, position=9)
    difference = (keys.double() - decoded).norm(dim=-1)
    # A key's rotation (7 roundings), its mean, and a chain of multiply-adds on top, in its length.
    reach = (
        keys.double().norm(dim=-1)
        + decoded.norm(dim=-1)
        + codec.mean.double().norm(dim=-1)[:, None]
    )
    off = (layout.rank + 30) * FLOAT_ERROR * reach
    allowed = 2 * off * difference + off.square() + 70 * FLOAT_ERROR * difference.square()
    assert_within(errors, difference.square(), allowed)


def test_wrong_errors():
    layout = make_layout(64, [4, 2], 2)
    keys = make_keys(2, 70, 64)
    args = reference.fit_keys(keys, layout).flat()
    args |= {"k_pages": make_k_pages(layout, 2), "keys": keys, "layout": layout, "slot": 3}
    args |= {"page_table": torch.tensor([1, 0], dtype=torch.int32)}
    right = torch.zeros(2, 70)
    call("pack_keys_", {**args, "errors": right})
    for wrong, message in (
        (right[:, 1:].contiguous(), r"\["),
        (right.double(), "Double"),
        (strided(right), "contiguous"),
    ):
        check_refusal("pack_keys_", {**args, "errors": wrong}, "errors", message)


@pytest.mark.parametrize("rope", ROPES)
def test_operators_as_torch_sees_them(rope):
    layout = make_layout(64, [4, 2], 2, rope)
    cache, keys, _ = make_cache(layout, [70, 10], [3, 5])
    c = with_outliers(cache, 3).but(
        window_keys=cache.window_keys.nan_to_num(), window_values=cache.window_values.nan_to_num()
    )
    c = c.but(outlier_keys=c.outlier_keys.nan_to_num())
    given = {"query": torch.randn(2, 4, 2, 64), **c.but(first_position=None, sink_tokens=1).flat()}
    torch.library.opcheck(torch.ops.svdq.attend.default, (), given)
    given = {**c.codec.sequence(0).flat(), "k_pages": c.k_pages, "keys": keys[0], "position": 0}
    given |= {"layout": layout.ints, "page_table": c.page_table[0], "slot": 1}
    given |= {"errors": torch.zeros(2, 70)}
    torch.library.opcheck(torch.ops.svdq.pack_keys_.default, (), given)
