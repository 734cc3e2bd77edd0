"""gather, and attention over what it gathered."""

import pytest
import torch

from attend_bounds import expect
from refusals import check_refusal, spoiled, strided
from support import assert_same, assert_within, make_cache, make_layout
from svdq import ops, reference
from svdq.layout import NO_SLOT, PAGE_TOKENS, pages_of

MIXED = [8, 4, 2, 1, 1, 0, 0, 0]
PAPER = [4, 4, 2, 0, 0, 0, 0, 0]
ROPES = ["pre", "post", "hybrid", "rotated-mean"]


def layout_of(rope, head_dim=64, schedule=MIXED, heads=2, **options):
    if rope == "rotated-mean":
        options["pre_bands"] = ((0, 0, 0, 0),) * heads
    return make_layout(
        head_dim, schedule, heads, "hybrid" if rope == "rotated-mean" else rope, **options
    )


def random_slots(seqlens, heads, count, sinks=0):
    """Some slots of every head, ascending, of different number; [B, H, count]."""
    slots = torch.full((len(seqlens), heads, count), NO_SLOT, dtype=torch.int32)
    for b, tokens in enumerate(seqlens):
        for h in range(heads):
            candidates = sinks + torch.randperm(max(tokens - sinks, 0))
            own = candidates[: max(count - 5 * h, 0)].sort().values
            slots[b, h, : len(own)] = own.int()
    return slots


@pytest.mark.parametrize("v_bits", [2, 3, 4, 16, 32])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_codes_are_copied(rope, head_dim, v_bits, backend):
    layout = layout_of(rope, head_dim, v_bits=v_bits)
    cache, _, _ = make_cache(layout, [200, 70, 0], [1, 1, 1])
    slots = random_slots([200, 70, 0], 2, 90)
    packed = cache.but(v_pages=cache.v_pages.nan_to_num()).packed
    for got, expected in zip(
        ops.gather(packed, slots), reference.gather(packed, slots), strict=True
    ):
        assert_same(got, expected)


def test_heads_of_different_size_are_copied(backend):
    bands = ((8, 0, 4, 8), (0, 0, 0, 0), (0, 12, 0, 0), (0, 0, 4, 32))
    layout = make_layout(64, [4], 4, "hybrid", pre_bands=bands)
    cache, _, _ = make_cache(layout, [200], [1])
    args = (cache.packed, random_slots([200], 4, 64))
    for got, expected in zip(ops.gather(*args), reference.gather(*args), strict=True):
        assert_same(got, expected)


def gathered(cache, slots, **changes):
    """The cache with these slots of its packed tokens alone."""
    pages = pages_of(slots.shape[2])
    batch, heads, count = slots.shape
    padded = torch.full((batch, heads, pages * PAGE_TOKENS), NO_SLOT, dtype=torch.int32)
    padded[:, :, :count] = slots
    k_pages, v_pages = reference.gather(cache.packed, padded)
    return cache.but(
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=torch.arange(batch * pages, dtype=torch.int32).view(batch, pages),
        cache_seqlens=torch.full((batch,), count, dtype=torch.int32),
        sink_tokens=0,
        token_slots=padded,
        **changes,
    )


CASES = {rope: {"rope": rope, "seqlens": [300], "first_positions": [7]} for rope in ROPES} | {
    "paper-pre": {"rope": "pre", "head_dim": 128, "schedule": PAPER, "group": 4, "sink_tokens": 8},
    "paper-post": {
        "rope": "post",
        "head_dim": 128,
        "schedule": PAPER,
        "group": 4,
        "sink_tokens": 8,
    },
    "batch": {"rope": "pre", "seqlens": [300, 0, 65], "first_positions": [0, 3, 100_000]},
    "batch-hybrid": {"rope": "hybrid", "seqlens": [300, 0, 65], "first_positions": [0, 3, 100_000]},
    "head-dim-80": {"rope": "pre", "head_dim": 80, "rotary_dim": 32},
    "head-dim-256": {"rope": "hybrid", "head_dim": 256, "heads": 1},
    "head-dim-512": {"rope": "pre", "head_dim": 512, "heads": 1, "seqlens": [150]},
    "exact-values": {"rope": "pre", "v_bits": 32},
    "2-bit-values": {"rope": "post", "v_bits": 2},
    "3-bit-values": {"rope": "post", "v_bits": 3},
    "far-apart": {"rope": "pre", "seqlens": [5000], "heads": 1, "count": 200},
    "one-query-head": {"rope": "hybrid", "group": 1},
    "eight-query-heads": {"rope": "pre", "group": 8},
}


def attend_case(
    rope,
    *,
    head_dim=64,
    schedule=MIXED,
    heads=2,
    group=2,
    seqlens=(300,),
    count=90,
    sink_tokens=0,
    v_bits=4,
    **options,
):
    layout = layout_of(rope, head_dim, schedule, heads, v_bits=v_bits)
    cache, keys, _ = make_cache(layout, list(seqlens), [5] * len(seqlens), **options)
    slots = random_slots(seqlens, heads, count, sink_tokens)
    query = torch.randn(len(seqlens), heads * group, 1, head_dim)
    return cache, keys, slots, query


@pytest.mark.parametrize("name", CASES)
def test_attention_over_gathered_tokens(name, backend):
    cache, _, slots, query = attend_case(**CASES[name])
    cache = gathered(cache, slots)
    expected = expect(cache, query)
    out, lse = ops.attend(query, **cache.kwargs())
    assert_within(out, expected.out, expected.out_error)
    assert_within(lse, expected.lse, expected.lse_error)


@pytest.mark.parametrize("rope", ROPES)
def test_all_tokens_gathered_are_all_tokens(rope):
    """The reference of gathered attention is that of the tokens where they were."""
    cache, _, _, query = attend_case(rope, seqlens=[130], first_positions=[11])
    every = torch.arange(130, dtype=torch.int32).expand(1, 2, -1)
    got = reference.attend(query.double(), **gathered(cache, every).kwargs())
    expected = reference.attend(query.double(), **cache.kwargs())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rope", ROPES)
def test_outliers_among_gathered_tokens(rope, backend):
    cache, keys, slots, query = attend_case(rope)
    indices = torch.tensor([[[0, 40, 84], [3, 63, NO_SLOT]]], dtype=torch.int32)
    held = torch.zeros(1, 2, 3, 64)
    for h in range(2):
        for i, index in enumerate(indices[0, h].tolist()):
            if index < NO_SLOT:
                held[0, h, i] = keys[0][h, slots[0, h, index]] + 8
    cache = gathered(cache, slots, outlier_slots=indices, outlier_keys=held)
    expected = expect(cache, query)
    out, lse = ops.attend(query, **cache.kwargs())
    assert_within(out, expected.out, expected.out_error)
    assert_within(lse, expected.lse, expected.lse_error)
    without = ops.attend(query, **cache.but(outlier_slots=None, outlier_keys=None).kwargs())[1]
    assert (lse - without).abs().max() > expected.lse_error.max()


def gather_args():
    layout = make_layout(64, [4], 2)
    cache, _, _ = make_cache(layout, [130], [1])
    return {
        "k_pages": cache.k_pages,
        "v_pages": cache.v_pages,
        "page_table": cache.page_table,
        "slots": random_slots([130], 2, 20),
        "layout": layout,
    }


@pytest.mark.parametrize(
    ("argument", "spoil", "word"),
    [
        ("slots", lambda x: spoiled(x, 192), "slots"),
        ("slots", lambda x: spoiled(x, -1), "slots"),
        ("slots", lambda x: x.long(), "Int"),
        ("slots", lambda x: x[0], "shape"),
        ("slots", lambda x: x[:, :1], "shape"),
        ("page_table", lambda x: x + 1000, "page_table"),
        ("k_pages", strided, "contiguous"),
        ("v_pages", lambda x: x[:, 1:], "v_pages"),
    ],
)
def test_wrong_tensors_are_refused(argument, spoil, word):
    args = gather_args()
    check_refusal("gather", args | {argument: spoil(args[argument])}, word)


def test_attend_refuses_slots_that_do_not_fit():
    cache, _, slots, query = attend_case("pre")
    cache = gathered(cache, slots)
    args = {"query": query, **cache.flat(), "layout": cache.layout}
    check_refusal("attend", args | {"token_slots": cache.token_slots[:, :, :64]}, "token_slots")
    check_refusal("attend", args | {"token_slots": cache.token_slots - 1}, "token_slots")
