"""PageLayout and the allocation of bits."""

import pytest
import torch

from support import assert_same
from svdq import _C, ops, reference
from svdq.layout import WIDTHS, PageLayout

BANDS = ((16, 32, 16, 0), (0, 4, 8, 24), (0, 0, 0, 0))


PRE_BANDS = ((4, 4, 0, 0), (0, 0, 0, 0), (0, 0, 4, 8))


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_ints_round_trip(rope):
    layout = PageLayout(128, BANDS, rope, v_bits=2)
    assert layout.ints[:6] == [3, 3, 128, ["pre", "post"].index(rope), 0, 1]
    coded = layout.ints[6:10] if rope == "pre" else layout.ints[10:14]
    assert coded == [16, 32, 16, 0]
    assert [layout.ints[6 + 9 * h + 8] for h in range(3)] == [2, 2, 2]
    assert PageLayout.from_ints(layout.ints) == layout


def test_heads_may_have_values_of_different_bits():
    layout = PageLayout(128, BANDS, "pre", v_bits=(4, 3, 2))
    assert PageLayout.from_ints(layout.ints) == layout
    assert (layout.v_bits, layout.mean_v_bits, layout.packs_values) == ((4, 3, 2), 3, True)
    exact = PageLayout(128, BANDS, "pre", v_bits=16)
    assert (exact.v_bits, exact.packs_values) == ((16, 16, 16), False)


@pytest.mark.parametrize("pre_bands", [PRE_BANDS, ()], ids=["pre-channels", "rotated-mean"])
def test_hybrid_ints_round_trip(pre_bands):
    layout = PageLayout(128, BANDS, "hybrid", v_bits=2, pre_bands=pre_bands)
    assert layout.ints[:6] == [3, 3, 128, 2, 0, 1]
    assert layout.ints[6:14] == [*(pre_bands[0] if pre_bands else [0] * 4), 16, 32, 16, 0]
    assert PageLayout.from_ints(layout.ints) == layout


def test_parts():
    layout = PageLayout(128, BANDS, "hybrid", v_bits=2, pre_bands=PRE_BANDS)
    assert layout.pre_part == PageLayout(128, PRE_BANDS, "pre", v_bits=2)
    assert layout.post_part == PageLayout(128, BANDS, "post", v_bits=2)
    assert layout.rank == layout.pre_part.rank + layout.post_part.rank == 8 + 12 + 100
    assert layout.k_page_bytes == layout.pre_part.k_page_bytes + layout.post_part.k_page_bytes
    assert layout.k_bits == layout.pre_part.k_bits + layout.post_part.k_bits
    assert PageLayout(128, BANDS, "hybrid").pre_part is None
    none = ((0, 0, 0, 0),) * 3
    assert PageLayout(128, none, "hybrid", pre_bands=PRE_BANDS).post_part is None
    pre, post = PageLayout(128, BANDS, "pre"), PageLayout(128, BANDS, "post")
    assert (pre.pre_part, pre.post_part) == (pre, None)
    assert (post.pre_part, post.post_part) == (None, post)


def test_sizes():
    layout = PageLayout(128, BANDS, "pre", v_bits=4)
    bits = [16 * 8 + 32 * 4 + 16 * 2, 4 * 4 + 8 * 2 + 24]
    assert (layout.num_kv_heads, layout.rank) == (3, 64 + 36)
    assert layout.k_bits == sum(bits) / (3 * 128)
    assert layout.k_page_bytes == _C.k_page_bytes(layout.ints) == sum(bits) * 64 // 8
    assert layout.v_page_bytes == _C.v_page_bytes(layout.ints) == 3 * (64 + 128 * 64 // 2)


WRONG_LAYOUTS = {
    "rope": ({"rope": "both"}, "rope"),
    "head_dim-72": ({"head_dim": 72}, "head_dim.*72"),
    "head_dim-528": ({"head_dim": 528}, "head_dim.*528"),
    "v_bits-5": ({"v_bits": 5}, "head 0 must have values of 16 or 32 bits, got 5"),
    "v_bits-of-two-heads": ({"v_bits": (4, 2)}, "one for each of 3 heads"),
    "packed-and-exact": ({"v_bits": (4, 16, 2)}, "head 0 must have values of 16 or 32 bits, got 4"),
    "exact-of-two-sizes": ({"v_bits": (16, 32, 16)}, "32 in head 1 and 16 in head 0"),
    "no-heads": ({"bands": ()}, "num_kv_heads"),
    "no-channels": ({"bands": ((0, 0, 0, 0),)}, "channel"),
    "too-many-channels": ({"bands": ((64, 64, 4, 0),)}, "132"),
    "part-of-a-line": ({"bands": ((0, 0, 0, 4),)}, "multiple of 8"),
    "odd-band": ({"bands": ((0, 6, 0, 0),)}, "multiple of 4"),
    "negative-band": ({"bands": ((8, -4, 0, 0),)}, "-4"),
    "version": ({"version": 1}, "version 1"),
    "pre-bands-of-pre": ({"rope": "pre", "pre_bands": BANDS}, "pre_bands.*'pre'"),
    "pre-bands-of-post": ({"rope": "post", "pre_bands": BANDS}, "pre_bands.*'post'"),
    "pre-bands-of-two-heads": ({"rope": "hybrid", "pre_bands": BANDS[:2]}, "3 heads, got 2"),
    "too-many-pre-channels": (
        {"rope": "hybrid", "pre_bands": ((64, 64, 4, 0), *BANDS[1:])},
        "132",
    ),
    "no-hybrid-channels": ({"rope": "hybrid", "bands": ((0, 0, 0, 0),)}, "channel"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_LAYOUTS.values(), ids=WRONG_LAYOUTS)
def test_wrong_layouts(change, message):
    with pytest.raises(ValueError, match=message):
        PageLayout(**{"head_dim": 128, "bands": BANDS, **change})


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 7, "version 7"),
        (1, 2, "integers"),
        (1, -1, "num_kv_heads"),
        (1, 2**40, "num_kv_heads"),
        (2, 0, "head_dim"),
        (3, 3, "rope"),
        (3, 1, "rope mode"),
        (4, 1, "keys of coding 0"),
        (5, 2, "values of coding 0"),
        (5, 0, "head 0 must have values of 16 or 32 bits, got 4"),
        (14, 16, "head 0 must have values of 2, 3 or 4 bits, got 16"),
        (6, 2**40, "head 0"),
        (10, 4, "rope mode"),
    ],
)
def test_wrong_ints(at, value, message):
    ints = list(PageLayout(128, BANDS).ints)
    ints[at] = value
    with pytest.raises(ValueError, match=message):
        PageLayout.from_ints(ints)


@pytest.mark.parametrize("ints", [[], [3], [3, 1, 128, 0, 0, 1]])
def test_too_few_ints(ints):
    with pytest.raises(ValueError, match="integers"):
        PageLayout.from_ints(ints)


@pytest.mark.parametrize(
    ("head_dim", "schedule", "expected"),
    [
        (128, [8, 4, 4, 2, 0, 0, 0, 0], [16, 32, 16, 0]),  # 2.25 bits
        (64, [4, 4, 2, 0, 0, 0, 0, 0], [0, 16, 8, 0]),  # 1.25 bits
        (64, [8, 4, 2, 1, 1, 0, 0, 0], [8, 8, 8, 16]),
        (80, [8, 4, 4, 2, 0, 0, 0, 0], [12, 20, 8, 0]),  # groups of 10: 10 -> 12, 30 -> 32, 40
        (96, [4, 4, 2, 0, 0, 0, 0, 0], [0, 24, 12, 0]),
        (64, [1], [0, 0, 0, 64]),
        (256, [8] * 8, [256, 0, 0, 0]),
        (16, [2, 1] + [0] * 14, [0, 0, 4, 0]),  # the second channel is already in the 2-bit line
    ],
)
def test_allocate_bits(head_dim, schedule, expected):
    bands = ops.allocate_bits(torch.rand(3, head_dim), schedule)
    assert_same(bands, torch.tensor([expected] * 3, dtype=torch.int32))


def test_allocate_bits_gives_no_channel_less_than_asked():
    for _ in range(200):
        head_dim = 16 * int(torch.randint(1, 17, ()))
        groups = int(torch.randint(1, head_dim + 1, ()))
        choice = torch.tensor([*WIDTHS, 0])[torch.randint(0, 5, (groups,)).sort().values]
        choice[0] = max(int(choice[0]), 1)
        schedule = choice.tolist()
        bands = ops.allocate_bits(torch.rand(1, head_dim), schedule)
        assert_same(bands, reference.allocate_bits(torch.rand(1, head_dim), schedule))
        layout = PageLayout(head_dim, (tuple(bands[0].tolist()),))  # it is valid
        given = reference.channel_widths(layout).tolist() + [0] * (head_dim - layout.rank)
        asked = [schedule[channel * groups // head_dim] for channel in range(head_dim)]
        # Only 1-bit channels at the very end that fill no line may miss out, seven at most.
        missing = [c for c in range(head_dim) if given[c] < asked[c]]
        assert all(asked[c] == 1 and c >= head_dim - 7 for c in missing)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "groups"),
        ([1] * 65, "groups"),
        ([4, 8], "increase"),
        ([3], "3"),
        ([16], "16"),
        ([-1], "-1"),
        ([0, 0], "at least one"),
    ],
)
def test_schedules_that_do_not_fit(schedule, message):
    with pytest.raises(ValueError, match=f"allocate_bits.*schedule.*{message}"):
        ops.allocate_bits(torch.rand(2, 64), schedule)
