"""What models do to their logits: softcap, learned sinks and sliding windows."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from attend_bounds import expect
from refusals import check_refusal, strided
from support import assert_same, assert_within, make_cache, make_layout
from svdq import ops, reference
from svdq.layout import NO_SLOT, PAGE_TOKENS
from svdq.ops import LogitRules

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call of attend with rules; ``sinks`` is the size of the learned ones, None for none."""

    softcap: float = 0.0
    sinks: float | None = None
    window_size: int = 0
    rope: str = "post"
    head_dim: int = 64
    group: int = 2
    q_len: int = 1
    seqlens: tuple[int, ...] = (150, 70)
    window_lens: tuple[int, ...] = (20, 33)
    dtype: torch.dtype = FLOAT32
    v_bits: int = 4
    outliers: int = 0
    gathered: bool = False
    options: dict = field(default_factory=dict, hash=False)  # of make_cache


def every(**changes) -> Case:
    """All rules at once: scores are a few units, so that a cap of 2 and sinks of 3 matter."""
    return Case(**{"softcap": 2.0, "sinks": 3.0, "window_size": 90} | changes)


HALF = {"v_dtype": BFLOAT16, "window_dtype": BFLOAT16}
CASES = {
    "softcap": Case(softcap=2.0),
    "large-softcap": Case(softcap=1e4),
    "small-softcap": Case(softcap=1e-2),
    "sinks": Case(sinks=3.0),
    "sinks-above-all": Case(sinks=100.0),
    "sinks-see-nothing-else": Case(sinks=2.0, seqlens=(0,), window_lens=(3,), q_len=5),
    "all": every(),
    "all-pre": every(rope="pre"),
    "all-hybrid": every(rope="hybrid"),
    "all-outliers": every(outliers=9),
    "all-gathered": every(gathered=True),
    "all-gathered-pre": every(gathered=True, rope="pre", outliers=5, q_len=2),
    "all-gathered-hybrid": every(gathered=True, rope="hybrid", options={"sink_tokens": 4}),
    "all-float-values": every(v_bits=32, q_len=3),
    "all-bfloat16": every(v_bits=16, dtype=BFLOAT16, q_len=12, options=HALF),
    "all-float16": every(dtype=FLOAT16, options={"window_dtype": FLOAT16}),
    "all-tiles": every(rope="pre", group=4, q_len=7, outliers=4),
    "all-tiles-float16": every(
        rope="hybrid", q_len=17, dtype=FLOAT16, options={"window_dtype": FLOAT16}
    ),
    "all-not-causal": every(q_len=70, seqlens=(300,), window_lens=(20,), options={"causal": False}),
    "head-dim-256": every(rope="pre", head_dim=256, seqlens=(130,), window_lens=(9,)),
    "head-dim-512": every(rope="hybrid", head_dim=512, seqlens=(130,), window_lens=(9,), q_len=9),
    # Windows that end in the exact window, at its edge, in its sinks, on and in pages, past all.
    **{
        f"window-{size}-{rope}": Case(
            window_size=size,
            rope=rope,
            q_len=q_len,
            v_bits=v_bits,
            options={"sink_tokens": 8, "first_positions": [0, 1000]},
        )
        for q_len in (1, 3)
        for size, rope, v_bits in (
            (1, "pre", 4),
            (12 + q_len, "post", 32),
            (20, "hybrid", 2),
            (12 + 22, "pre", 32),
            (12 + 22 + PAGE_TOKENS, "post", 3),
            (100, "pre", 4),
            (150 + 12 - 3, "post", 4),
            (10_000, "hybrid", 4),
            (2**31 - 1, "pre", 4),
        )
    },
    # Whole splits lie before the window, and sequences begin at other blocks.
    **{
        f"long-{rope}": Case(
            window_size=700, rope=rope, seqlens=(4250, 40, 1600), window_lens=(70, 9, 30)
        )
        for rope in ("pre", "post", "hybrid")
    },
    "long-queries": Case(window_size=100, q_len=200, seqlens=(600,), window_lens=(230,)),
}


def make(case: Case):
    """Cache and query of a case."""
    torch.manual_seed(0)
    layout = make_layout(case.head_dim, [4, 4, 2, 0], 2, case.rope, v_bits=case.v_bits)
    cache, _, _ = make_cache(layout, list(case.seqlens), list(case.window_lens), **case.options)
    heads, batch = 2 * case.group, len(case.seqlens)
    query = 2 * torch.randn(batch, heads, case.q_len, case.head_dim)
    sinks = None if case.sinks is None else case.sinks + torch.rand(heads)
    # The tokens before the queries, which are the window's last where the call is causal.
    before = [
        max(packed - cache.sink_tokens, 0) + own - (case.q_len if cache.causal else 0)
        for packed, own in zip(case.seqlens, case.window_lens, strict=True)
    ]
    if case.gathered:
        slots = torch.full((batch, 2, cache.page_table.shape[1] * PAGE_TOKENS), NO_SLOT).int()
        for b, count in enumerate(case.seqlens):
            for h in range(2):
                own = torch.randperm(3 * count - cache.sink_tokens)[: count - 9 * h].sort().values
                slots[b, h, : len(own)] = own + cache.sink_tokens
            before[b] += 2 * count
        cache = cache.but(token_slots=slots)
    if case.outliers:
        own = [torch.randperm(count - 10)[: case.outliers].sort().values for count in case.seqlens]
        slots = torch.stack(own).int()[:, None].repeat(1, 2, 1)
        keys = torch.randn(batch, 2, case.outliers, case.head_dim).to(case.dtype)
        cache = cache.but(outlier_slots=slots, outlier_keys=keys)
    first = [reference.attention.first_position(cache.packed, b) for b in range(batch)]
    position = torch.tensor(first, dtype=torch.int32) + torch.tensor(before, dtype=torch.int32)
    rules = LogitRules(case.softcap, sinks, case.window_size)
    return cache.but(rules=rules, query_position=position), query.to(case.dtype)


def check(cache, query):
    expected = expect(cache, query)
    out, lse = ops.attend(query, **cache.kwargs())
    assert_within(out, expected.out, expected.out_error)
    assert_within(lse, expected.lse, expected.lse_error)
    return out, expected


@pytest.mark.parametrize("name", CASES)
def test_rules(backend, name):
    out, expected = check(*make(CASES[name]))
    assert out.isfinite().all()
    # The bounds leave most of a number: less than what the rules change.
    assert float(expected.out_error.median()) < 0.25


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("all", "softcap"),
        ("all-outliers", "softcap"),
        ("all-tiles", "sinks"),
        ("all-hybrid", "window_size"),
        ("all-gathered", "window_size"),
        ("window-20-hybrid", "window_size"),
    ],
)
def test_the_bounds_notice_a_missing_rule(backend, name, rule):
    cache, query = make(CASES[name])
    expected = expect(cache, query)
    rules = replace(cache.rules, **{rule: getattr(LogitRules(), rule)})
    out, _ = ops.attend(query, **cache.but(rules=rules).kwargs())
    assert ((out - expected.out).abs() > expected.out_error).any()


def test_a_window_over_everything_changes_nothing(backend):
    cache, query = make(Case(window_size=10_000, q_len=3, rope="pre"))
    for got, plain in zip(
        ops.attend(query, **cache.kwargs()),
        ops.attend(query, **cache.but(rules=LogitRules()).kwargs()),
        strict=True,
    ):
        assert_same(got, plain)


def test_parts_merge_to_the_whole_with_sinks_in_one(backend):
    cache, query = make(Case(softcap=3.0, sinks=2.0, q_len=4))
    whole = expect(cache, query)
    pages = cache.but(window_lens=torch.zeros_like(cache.window_lens))
    window = cache.but(
        cache_seqlens=torch.zeros_like(cache.cache_seqlens),
        rules=cache.rules.without_sinks(),
    )
    parts = [ops.attend(query, **part.kwargs()) for part in (pages, window)]
    out, lse = ops.merge(*parts[0], *parts[1])
    assert_within(out, whole.out, 2 * whole.out_error)
    assert_within(lse, whole.lse, 2 * whole.lse_error)


def test_wrong_rules():
    cache, query = make(every(options={"sink_tokens": 3}))
    args = {"query": query, **cache.flat(), "layout": cache.layout}
    for value in (-1.0, 1e-31, 1e31, float("nan"), float("inf")):
        check_refusal("attend", {**args, "softcap": value}, "softcap must be 0")
    for value in (-1, 2**31):
        check_refusal("attend", {**args, "window_size": value}, "window_size must be 0", str(value))
    check_refusal("attend", {**args, "query_position": None}, "query_position", "window_size")
    sinks, position = cache.rules.sinks, cache.query_position
    for wrong, message in (
        (sinks.double(), "Double"),
        (sinks[1:].contiguous(), r"\["),
        (strided(sinks), "contiguous"),
        *((torch.where(sinks == sinks[1], x, sinks), "finite") for x in (torch.nan, torch.inf)),
    ):
        check_refusal("attend", {**args, "sinks": wrong}, "sinks", message)
    for wrong, message in (
        (position.long(), "Long"),
        (position[1:].contiguous(), r"\["),
        (strided(position), "contiguous"),
    ):
        check_refusal("attend", {**args, "query_position": wrong}, "query_position", message)


def test_operator_as_torch_sees_it():
    cache, query = make(every(q_len=2))
    cache = cache.but(
        window_keys=cache.window_keys.nan_to_num(), window_values=cache.window_values.nan_to_num()
    )
    torch.library.opcheck(torch.ops.svdq.attend.default, (), {"query": query, **cache.flat()})
