"""Numbers that are not finite: refused by every operator that stores or fits them."""

import pytest
import torch

from refusals import check_refusal
from support import make_k_pages, make_keys, make_layout, make_v_pages
from svdq import ops, reference

NAN, INF = float("nan"), float("inf")
LAYOUT = make_layout(64, [4, 2], 2, "post")
KEYS = make_keys(2, 70, 64)
CODEC = reference.fit_keys(KEYS, LAYOUT)


def keys_not_finite(dtype):
    """Keys with one such number: in every lane, the first and the last token, any head."""
    keys = KEYS.to(dtype)
    for at in [(0, 0, 0), (1, 69, 63), (0, 33, 17), (1, 64, 5), (0, 63, 48)]:
        for wrong in (NAN, INF, -INF):
            bad = keys.clone()
            bad[at] = wrong
            yield bad


@pytest.mark.libraries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bases_of_numbers_that_are_not_finite(backend, dtype):
    for bad in keys_not_finite(dtype):
        check_refusal("fit_basis", {"keys": bad}, "keys", "finite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite(backend, dtype):
    keys = KEYS.to(dtype)
    for bad in keys_not_finite(dtype):
        where = {"layout": LAYOUT, "page_table": torch.tensor([1, 0], dtype=torch.int32), "slot": 3}
        packed = {**CODEC.flat(), "k_pages": make_k_pages(LAYOUT, 2), "keys": bad, **where}
        check_refusal("pack_keys_", packed, "keys", "finite")
        packed = {"v_pages": make_v_pages(LAYOUT, 2), "values": bad, **where}
        check_refusal("pack_values_", packed, "values", "finite")
        rows = {"window_keys": torch.randn(2, 80, 64), "window_values": torch.randn(2, 80, 64)}
        rows = {name: x.to(dtype) for name, x in rows.items()}
        for names in (("keys", "values"), ("values", "keys")):
            new = dict(zip(names, (bad, keys), strict=True))
            check_refusal("append_window_", {**rows, **new, "start": 3}, names[0], "finite")


@pytest.mark.libraries
def test_the_largest_numbers_are_taken(backend):
    top = torch.finfo(torch.float32).max
    ops.fit_basis(torch.zeros(1, 5, 16).index_fill(1, torch.tensor([2]), 1e18))
    rows = torch.zeros(2, 1, 5, 16)
    ops.append_window_(
        rows[0], rows[1], torch.full((1, 2, 16), top), torch.full((1, 2, 16), -top), 0
    )
    assert float(rows[0, 0, 1, 15]) == top
