"""select against the plain masses of every token, and what holds whatever the masses."""

from dataclasses import dataclass, field

import pytest
import torch

from refusals import check_refusal, spoiled, strided
from select_bounds import log_mass_errors
from support import make_cache, make_layout
from svdq import ops, reference
from svdq.layout import NO_SLOT


@dataclass(frozen=True)
class Case:
    """One call; heads are KV heads, groups are query heads of each."""

    schedule: tuple[int, ...] = (4, 4, 2, 0, 0, 0, 0, 0)
    rope: str = "pre"
    head_dim: int = 64
    heads: int = 2
    group: int = 3
    q_len: int = 1
    seqlens: tuple[int, ...] = (700,)
    budget: int = 60
    channels: int = 8
    sink_tokens: int = 8
    outliers: tuple[tuple[int, ...], ...] = ()  # of every head
    pre_bands: tuple = ()
    options: dict = field(default_factory=dict, hash=False)


CASES = {
    "pre": Case(),
    "post": Case(rope="post"),
    "hybrid": Case(rope="hybrid"),
    "hybrid-4-pre": Case(rope="hybrid", pre_bands=((0, 4, 0, 0), (0, 0, 0, 0)), channels=12),
    "rotated-mean": Case(rope="hybrid", pre_bands=((0, 0, 0, 0),) * 2),
    "head-dim-128": Case(head_dim=128, group=4),
    "head-dim-80": Case(head_dim=80, options={"rotary_dim": 32}),
    "head-dim-256": Case(head_dim=256, heads=1),
    "8-bit": Case(schedule=(8,), channels=12),
    "8-and-4-bit": Case(schedule=(8, 4, 4, 2, 0, 0, 0, 0), channels=16),
    "2-bit": Case(schedule=(2,)),
    "1-bit": Case(schedule=(1,), channels=4),
    "all-widths": Case(schedule=(8, 4, 2, 1), head_dim=32, channels=32, rope="post"),
    "16-channels": Case(channels=16),
    "32-channels": Case(channels=32, rope="post", schedule=(4, 2)),
    "mqa": Case(heads=1, group=8),
    "mha": Case(heads=4, group=1),
    "several-queries": Case(q_len=3),
    "batch": Case(seqlens=(300, 0, 64, 1), options={"first_positions": [0, 5, -7, 100_000]}),
    "long": Case(seqlens=(9000,), heads=1, budget=281, options={"first_positions": [3]}),
    "long-post": Case(seqlens=(9000,), heads=1, budget=281, rope="post"),
    "budget-of-1": Case(budget=1),
    "budget-of-all": Case(budget=692),
    "budget-beyond-all": Case(budget=900, seqlens=(700, 130)),
    "no-sinks": Case(sink_tokens=0),
    "sinks-are-all": Case(seqlens=(60, 130), sink_tokens=64),
    "outliers": Case(outliers=((20, 100, 333), (9,)), budget=40),
    "outliers-past-the-end": Case(outliers=((20, 699), (8, 9, 10, 11)), seqlens=(700, 300)),
}


def make(case):
    rope_options = {"pre_bands": case.pre_bands} if case.pre_bands else {}
    layout = make_layout(case.head_dim, list(case.schedule), case.heads, case.rope, **rope_options)
    cache, _, _ = make_cache(layout, list(case.seqlens), [1] * len(case.seqlens), **case.options)
    query = torch.randn(len(case.seqlens), case.heads * case.group, case.q_len, case.head_dim) * 2
    outliers = None
    if case.outliers:
        room = max(map(len, case.outliers))
        lists = [[*own, *[NO_SLOT] * (room - len(own))] for own in case.outliers]
        outliers = torch.tensor([lists] * len(case.seqlens), dtype=torch.int32)
        for b, tokens in enumerate(case.seqlens):
            outliers[b][outliers[b] >= tokens] = NO_SLOT
    return cache, query, outliers


def arguments(case, cache, query, outliers):
    """Arguments of select and of its reference."""
    own = cache.but(sink_tokens=case.sink_tokens, outlier_slots=outliers)
    return {
        "query": query,
        "packed": own.packed,
        "budget": case.budget,
        "sm_scale": cache.sm_scale,
        "channels": case.channels,
    }


def flat_arguments(case, cache, query, outliers):
    """The same, named as in the flat schema."""
    args = arguments(case, cache, query, outliers)
    packed = args.pop("packed")
    return {**packed.flat(), "layout": packed.layout, **args}


@pytest.mark.parametrize("name", CASES)
def test_the_best_tokens_are_selected(name, backend):
    case = CASES[name]
    cache, query, outliers = make(case)
    slots, indices = ops.select(**arguments(case, cache, query, outliers))
    room = 0 if outliers is None else outliers.shape[2]
    assert slots.shape == (len(case.seqlens), case.heads, case.budget + room)
    decided = []
    for b, tokens in enumerate(case.seqlens):
        codes = reference.unpack_codes(cache.k_pages, cache.layout, cache.page_table[b], 0, tokens)
        first = 0 if cache.first_position is None else int(cache.first_position[b])
        scored = (query[b], codes, cache.codec.sequence(b), cache.layout, cache.sm_scale)
        masses = reference.token_masses(
            *scored, channels=case.channels, position=first, sink_tokens=case.sink_tokens
        ).log()
        errors = log_mass_errors(*scored, channels=case.channels)
        for h in range(case.heads):
            own = [] if outliers is None else [x for x in outliers[b, h].tolist() if x < NO_SLOT]
            chosen = slots[b, h].tolist()
            decided.append(check_one_head(chosen, masses[h], errors[h], case, tokens, own))
            if room:
                expected = [chosen.index(x) for x in own] + [NO_SLOT] * (room - len(own))
                assert indices[b, h].tolist() == expected
    assert max(decided) > 0.1  # the bounds say something


def check_one_head(chosen, masses, errors, case, tokens, outliers):
    """Checks one head's slots; returns the share of tokens that the bounds decide about."""
    candidates = sorted(set(range(min(case.sink_tokens, tokens), tokens)) - set(outliers))
    real = [slot for slot in chosen if slot < NO_SLOT]
    count = min(case.budget, len(candidates))
    assert chosen == sorted(real) + [NO_SLOT] * (len(chosen) - len(real))
    assert len(real) == len(set(real)) == count + len(outliers)
    assert set(outliers) <= set(real)
    selected = set(real) - set(outliers)
    assert selected <= set(candidates)
    if not 0 < count < len(candidates):
        return 1.0
    at = torch.tensor(candidates)
    low, high = masses[at] - errors[at], masses[at] + errors[at]
    surely_in = low > high.sort(descending=True).values[count]
    surely_out = high < low.sort(descending=True).values[count - 1]
    assert selected >= set(at[surely_in].tolist())
    assert not selected & set(at[surely_out].tolist())
    return float((surely_in | surely_out).double().mean())


def test_the_reference_selects_by_its_masses():
    case = CASES["outliers"]
    cache, query, outliers = make(case)
    slots, indices = reference.select(**arguments(case, cache, query, outliers))
    assert slots.shape[2] == 43
    assert indices[0].tolist() == [
        [slots[0, 0].tolist().index(x) for x in (20, 100, 333)],
        [slots[0, 1].tolist().index(9), NO_SLOT, NO_SLOT],
    ]


def test_of_equal_tokens_the_first_are_selected(backend):
    case = Case(rope="post", schedule=(4,), sink_tokens=3, budget=20)
    cache, query, _ = make(case)
    cache.k_pages.fill_(0x77)
    slots, _ = ops.select(**arguments(case, cache, query, None))
    assert (slots == torch.arange(3, 23)).all()


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_threads_do_not_matter(rope, num_threads):
    case = Case(rope=rope, seqlens=(5000, 700))
    args = arguments(case, *make(case))
    results = []
    for threads in (1, 2, 3):
        num_threads(threads)
        results.append(ops.select(**args)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_scores_far_above_the_sample_stay_ordered(backend):
    """The sample of a long sequence may miss the one page that all the mass is on."""
    case = Case(rope="post", heads=1, group=1, schedule=(4,), seqlens=(64 * 200,), budget=8)
    cache, query, _ = make(case)
    query *= 40
    args = arguments(case, cache, query, None)
    slots = set(ops.select(**args)[0][0, 0].tolist())
    expected = set(reference.select(**args)[0][0, 0].tolist())
    assert len(slots & expected) >= 4


REFUSED = {
    "budget": ({"budget": 0}, "budget", "1"),
    "channels-of-3": ({"channels": 3}, "channels", "multiple of 4"),
    "channels-of-64": ({"channels": 64}, "channels", "32"),
    "no-frequencies": ({"inv_freq": None}, "inv_freq"),
    "sinks": ({"sink_tokens": -1}, "sink_tokens"),
    "infinite-scale": ({"sm_scale": float("inf")}, "sm_scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_numbers_are_refused(name):
    case = CASES["pre"]
    changes, *words = REFUSED[name]
    check_refusal("select", flat_arguments(case, *make(case)) | changes, *words)


@pytest.mark.parametrize(
    ("argument", "spoil", "word"),
    [
        ("query", lambda x: x[:, :5], "heads"),
        ("query", lambda x: x.double(), "float32"),
        ("query", lambda x: x[..., :32], "shape"),
        ("k_pages", lambda x: x[:, 1:], "shape"),
        ("page_table", lambda x: spoiled(x, 99), "page_table"),
        ("cache_seqlens", lambda x: spoiled(x, 9999), "cache_seqlens"),
        ("basis", strided, "contiguous"),
        ("scale", lambda x: x.half(), "Float"),
        ("outlier_slots", lambda x: x.flip(2), "ascend"),
    ],
)
def test_wrong_tensors_are_refused(argument, spoil, word):
    case = Case(outliers=((20, 30), (40, 50)))
    args = flat_arguments(case, *make(case))
    check_refusal("select", args | {argument: spoil(args[argument])}, word)
