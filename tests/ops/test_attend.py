"""attend over packed pages and the window, against float64 attention over what they decode to."""

import functools
from dataclasses import dataclass

import pytest
import torch

from attend_bounds import Expected, expect, uses_halves
from attend_cases import CASES, FLOAT32
from support import Cache, assert_same, assert_within, make_cache, make_keys, make_layout, rms
from svdq import ops, reference
from svdq.layout import PageLayout
from svdq.ops import PackedKeys, Window

# Errors of the arithmetic, as a share of the error that coding keys and values makes. They add up
# as squares, so this much is 2 % more. The largest part is rounding probabilities to 8 bits:
# codes from the middle have a mean square of 85 / 4 at 4 bits, so that a page adds a variance of
# at most 63 / 4 * 85 / 4 steps where one token has all its weight, 255 steps, and rounding that
# token's value made 255^2 / 12: 6 %, the square of 0.25, and less the more tokens count.
QUALITY = 0.2


@dataclass
class Given:
    """Inputs of a case, what must come out, and the error that quantizing its keys makes."""

    cache: Cache
    query: torch.Tensor
    expected: Expected
    coding_error: float


def exact_attention(cache: Cache, keys: list, values: list, query: torch.Tensor) -> torch.Tensor:
    """The outputs if nothing had been quantized: packed tokens, moved to the window."""
    outs = []
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        seen, rows = k.shape[1], int(cache.window_lens[b])
        alone = cache.but(
            page_table=cache.page_table[b : b + 1],
            cache_seqlens=torch.zeros(1, dtype=torch.int32),
            basis=cache.basis[b : b + 1],
            scale=cache.scale[b : b + 1],
            mean=cache.mean[b : b + 1],
            post_mean=None if cache.post_mean is None else cache.post_mean[b : b + 1],
            window_keys=torch.cat([k, cache.window_keys[b, :, :rows]], dim=1)[
                None, :, cache.sink_tokens :
            ],
            window_values=torch.cat([v, cache.window_values[b, :, :rows]], dim=1)[
                None, :, cache.sink_tokens :
            ],
            window_lens=torch.tensor([seen + rows - cache.sink_tokens]),
            first_position=None,
        )
        outs.append(reference.attend(query[b : b + 1].double(), **alone.kwargs())[0])
    return torch.cat(outs)


def given(name: str) -> Given:
    """A case, made and computed once for all backends that compute alike."""
    return given_to(name, uses_halves())


@functools.cache
def given_to(name: str, halves: bool) -> Given:
    case = CASES[name]
    torch.manual_seed(0)
    pre = {"pre_bands": case.pre_bands} if case.pre_bands else {}
    if case.bands:
        layout = PageLayout(case.head_dim, case.bands, case.rope, case.v_bits, **pre)
    else:
        layout = make_layout(
            case.head_dim, list(case.schedule), case.heads, case.rope, v_bits=case.v_bits, **pre
        )
    cache, keys, values = make_cache(
        layout, list(case.seqlens), list(case.window_lens), **case.options
    )
    heads = layout.num_kv_heads * case.group
    query = torch.randn(len(case.seqlens), heads, case.q_len, case.head_dim).to(case.dtype)
    expected = expect(cache, query)
    coding_error = 0.0
    if min(case.seqlens) > cache.sink_tokens and min(case.window_lens) >= case.q_len:
        coding_error = rms(exact_attention(cache, keys, values, query) - expected.out)
    return Given(cache, query, expected, coding_error)


def check(out, lse, expected: Expected):
    assert_within(out, expected.out, expected.out_error)
    assert_within(lse, expected.lse, expected.lse_error)


@pytest.mark.parametrize("name", CASES)
def test_attend(backend, name):
    case = given(name)
    out, lse = ops.attend(case.query, **case.cache.kwargs())
    assert (out.dtype, lse.dtype) == (case.query.dtype, torch.float32)
    check(out, lse, case.expected)
    if case.query.dtype == FLOAT32 and case.coding_error:
        assert rms(out - case.expected.out) <= QUALITY * case.coding_error


def test_rounded_weights_move_no_page_as_a_whole(backend):
    """Errors of scores multiply codes less the middle, so their mean is that of random errors.

    Of 8-bit channels and narrower ones in one vector, the narrower have no low terms.
    """
    if uses_halves():
        return  # queries are rounded, too, and all tokens share that
    layout = make_layout(64, [8, 4, 2, 1, 1, 0, 0, 0], 2, "pre")
    cache, _, _ = make_cache(layout, [64], [0], rotary_dim=2)
    query, off, allowed = torch.randn(1, 4, 1, 64), [], []
    for token in range(64):  # alone, so that the log-sum-exp is its score
        one = cache.but(sink_tokens=token, cache_seqlens=torch.tensor([token + 1]).int())
        expected = expect(one, query)
        off.append(ops.attend(query, **one.kwargs())[1] - expected.lse)
        allowed.append(expected.lse_error)
    mean, random = torch.stack(off).mean(0), torch.stack(allowed).mean(0) / 64**0.5
    assert_within(mean, torch.zeros(1, 4, 1), random)


def test_the_bounds_notice_one_missing_token(backend):
    """The checks above must fail where one token of 170 is left out."""
    case = given("paper-1.25-post")
    cache = case.cache.but(cache_seqlens=case.cache.cache_seqlens - 1)
    out, _ = ops.attend(case.query, **cache.kwargs())
    assert rms(out - case.expected.out) > QUALITY * case.coding_error


def test_nothing_to_attend_to(backend):
    layout = make_layout(64, [4], 2)
    for causal in (True, False):
        cache, _, _ = make_cache(layout, [0, 70], [0, 0], causal=causal, sink_tokens=70)
        out, lse = ops.attend(torch.randn(2, 4, 3, 64), **cache.kwargs())
        assert_same(out, torch.zeros(2, 4, 3, 64))
        assert_same(lse, torch.full((2, 4, 3), -torch.inf))


def test_queries_before_the_window_see_nothing(backend):
    """Causal, five queries and a window of three: the first two are not in it."""
    cache, _, _ = make_cache(make_layout(64, [4], 1), [0], [3])
    out, lse = ops.attend(torch.randn(1, 2, 5, 64), **cache.kwargs())
    assert_same(out[:, :, :2], torch.zeros(1, 2, 2, 64))
    assert_same(lse[:, :, :2], torch.full((1, 2, 2), -torch.inf))
    # The third sees one token alone.
    assert_within(out[:, :, 2], cache.window_values[:, :, 0].expand(1, 2, 64), 1e-6)


@pytest.mark.libraries
@pytest.mark.parametrize("name", ["q-len-5", "batch-pre"])
def test_strided_query(backend, name):
    """[B, L, Hq, D] as projections leave it, seen as [B, Hq, L, D]."""
    case = given(name)
    query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not query.is_contiguous()
    for got, expected in zip(
        ops.attend(query, **case.cache.kwargs()),
        ops.attend(case.query, **case.cache.kwargs()),
        strict=True,
    ):
        assert_same(got, expected)


def test_strided_window(backend):
    """A part of a larger buffer, as a cache that grows in steps holds it."""
    case = given("batch")
    rows = torch.full((2, 5, 3, 200, 64), torch.nan)
    rows = rows[:, 1:4, :2, :150]
    size = case.cache.window_keys.shape[2]
    rows[0, :, :, :size], rows[1, :, :, :size] = case.cache.window_keys, case.cache.window_values
    cache = case.cache.but(window_keys=rows[0], window_values=rows[1])
    check(*ops.attend(case.query, **cache.kwargs()), case.expected)


@pytest.mark.parametrize("name", ["splits", "splits-pre", "q-len-64", "batch"])
def test_results_are_the_same_on_any_number_of_threads(backend, num_threads, name):
    case = given(name)
    num_threads(1)
    first = ops.attend(case.query, **case.cache.kwargs())
    for n in (1, 2, 3):
        num_threads(n)
        for got, expected in zip(ops.attend(case.query, **case.cache.kwargs()), first, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("size", [1e-6, 30.0, 1e4])
def test_scores_of_any_size(backend, rope, size):
    """Tiny queries average; huge ones pick a token, which no other may disturb."""
    cache, _, _ = make_cache(make_layout(64, [8, 8, 4, 2], 1, rope), [150], [20])
    query = size * torch.randn(1, 3, 2, 64)
    out, lse = ops.attend(query, **cache.kwargs())
    expected = expect(cache, query)
    assert out.isfinite().all()
    # Outputs are averages of values, so no error exceeds their range.
    reach = torch.tensor(2.1 * 6.0).double()
    assert_within(out, expected.out, expected.out_error.nan_to_num(nan=torch.inf).minimum(reach))
    assert_within(lse, expected.lse, expected.lse_error.nan_to_num(nan=torch.inf))
    if size < 1:
        values = reference.unpack_values(cache.v_pages, cache.layout, cache.page_table[0], 0, 150)
        seen = torch.cat([values, cache.window_values[0, :, :20]], dim=1)
        assert_within(out[0, :, 1], seen.mean(1).expand(3, 64), 1e-3)


def test_hugely_negative_scores(backend):
    """A common offset of -1e4 changes neither outputs nor probabilities, only the log-sum-exp."""
    layout = make_layout(64, [8], 1)
    cache, _, _ = make_cache(layout, [150], [20])
    direction = torch.randn(64)
    direction /= direction.norm()
    query = (100 * direction).expand(1, 2, 1, 64).contiguous()
    shift = -1e4 * 8.0 / 100 * direction  # times 64 ** -0.5: a score of -1e4
    moved = cache.but(mean=cache.mean + shift, window_keys=cache.window_keys + shift)
    out, lse = ops.attend(query, **moved.kwargs())
    expected = expect(moved, query)
    check(out, lse, expected)
    assert float(expected.out_error.median()) < 0.5
    assert (lse < -9e3).all()


def test_position_shifts_leave_rotated_scores_alone(backend):
    """Before RoPE, codes hold un-rotated keys: keys and queries moved alike score alike."""
    layout = make_layout(64, [8], 2, "pre")
    torch.manual_seed(1)
    raw_query = torch.randn(1, 4, 1, 64)
    results = []
    for first in (0, 12_345):
        torch.manual_seed(2)
        cache, _, _ = make_cache(layout, [100], [1], first_positions=[first], causal=False)
        cache = cache.but(window_lens=torch.zeros(1, dtype=torch.int32))
        query = reference.rotate(raw_query, torch.tensor([first + 100]), cache.inv_freq).float()
        results.append((ops.attend(query, **cache.kwargs()), expect(cache, query)))
    (near, expected), (far, expected_far) = results
    check(*near, expected)
    # Keys were rotated in float32, unrotated and coded: codes on a boundary may differ.
    assert_within(far[0], near[0], expected.out_error + expected_far.out_error)


def test_one_page_in_many_sequences(backend):
    """A prefix that sequences share lies in the pool once."""
    layout = make_layout(64, [4, 2], 2)
    cache, _, _ = make_cache(layout, [128], [4])
    query = torch.randn(1, 4, 1, 64)
    alone = ops.attend(query, **cache.kwargs())
    names = ("page_table", "cache_seqlens", "basis", "scale", "mean")
    names += ("window_keys", "window_values", "window_lens")
    both = {name: torch.cat([getattr(cache, name)] * 2) for name in names}
    out, lse = ops.attend(query.repeat(2, 1, 1, 1), **cache.but(**both).kwargs())
    for got, expected in ((out, alone[0]), (lse, alone[1])):
        assert_same(got[:1], expected)
        assert_same(got[1:], expected)


def test_no_queries(backend):
    cache, _, _ = make_cache(make_layout(64, [4], 2), [70], [4])
    out, lse = ops.attend(torch.empty(1, 4, 0, 64), **cache.kwargs())
    assert out.shape == (1, 4, 0, 64)
    assert lse.shape == (1, 4, 0)


def test_no_sequences_and_no_pages(backend):
    """Pools and tables of nothing are fine as long as no sequence needs them."""
    cache, _, _ = make_cache(make_layout(64, [4], 2), [0, 0], [3, 0])
    cache = cache.but(
        k_pages=cache.k_pages[:0], v_pages=cache.v_pages[:0], page_table=cache.page_table[:, :0]
    )
    query = torch.randn(2, 4, 1, 64)
    check(*ops.attend(query, **cache.kwargs()), expect(cache, query))
    names = ("page_table", "cache_seqlens", "basis", "scale", "mean")
    names += ("window_keys", "window_values", "window_lens")
    none = cache.but(**{name: getattr(cache, name)[:0] for name in names})
    out, lse = ops.attend(query[:0], **none.kwargs())
    assert (out.shape, lse.shape) == ((0, 4, 1, 64), (0, 4, 1))


@pytest.mark.libraries
def test_operators_chain(backend):
    """Fit, pack and attend by the operators alone: 8 bits and float32 values are close to exact."""
    heads, dim, tokens = 2, 64, 300
    keys, values = make_keys(heads, tokens, dim), torch.randn(heads, tokens, dim)
    layout = make_layout(dim, [8], heads, v_bits=32)
    mean, components, _ = ops.fit_basis(keys)
    codec = ops.fit_quantizer(keys, mean, components, layout)
    table = torch.randperm(5, dtype=torch.int32)
    k_pages = torch.zeros(5, layout.k_page_bytes, dtype=torch.uint8)
    v_pages = torch.zeros(5, layout.v_page_bytes // 4)
    ops.pack_keys_(k_pages, keys, codec, layout, table, 0)
    ops.pack_values_(v_pages, values, layout, table, 0)
    query = torch.randn(1, 4, 1, dim)
    none = torch.zeros(1, heads, 0, dim)
    lens = torch.tensor([[tokens], [0]], dtype=torch.int32)
    packed = PackedKeys(layout, codec.batched(), k_pages, table[None], lens[0], v_pages)
    out, _ = ops.attend(query, packed, Window(none, none, lens[1]), dim**-0.5, causal=False)
    seen = torch.ones(1, tokens, dtype=torch.bool)
    exact, _ = reference.attend_keys(query[0], keys, values, seen, dim**-0.5)
    # Half of 1/255 of some six deviations in each of 64 channels: scores move by some percent.
    assert rms(out[0] - exact) < 0.02 * rms(exact)
