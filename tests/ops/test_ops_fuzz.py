"""Random calls of every operator: a right answer or one error, never a crash or a changed input.

``SVDQ_FUZZ=n`` makes n calls of each instead of some, each time others.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_input import RIGHT
from test_memory import WRITTEN, right, run

from support import make_cache, make_layout
from svdq.layout import NO_SLOT, PageLayout

CALLS = int(os.environ.get("SVDQ_FUZZ", "0"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.uint8]
LAYOUTS = [
    make_layout(dim, schedule, heads, rope, v_bits=bits)
    for dim, schedule, heads, rope, bits in (
        (64, [4, 2], 2, "post", 4), (64, [8], 2, "pre", 4), (64, [4, 2, 1, 0], 2, "hybrid", 2),
        (32, [4], 2, "post", 4), (64, [4, 2], 1, "post", 4), (64, [4, 2], 2, "post", 32),
    )
]  # fmt: skip


def same_numbers(a, b):
    """NaN is NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def selecting():
    cache, _, _ = make_cache(make_layout(64, [4, 2], 2, "post"), [130, 70], [5, 9])
    flat = cache.flat() | {"layout": cache.layout, "query": torch.randn(2, 4, 1, 64)}
    slots = torch.full((2, 2, 64), NO_SLOT, dtype=torch.int32)
    slots[:, :, :3] = torch.tensor([1, 5, 69], dtype=torch.int32)
    return flat | {"budget": 16, "slots": slots}


def arguments(op):
    return selecting() if op in ("select", "gather") else right(op)


def spoil(draw, value):
    """A value that may be wrong."""
    if isinstance(value, PageLayout):
        return draw(st.sampled_from(LAYOUTS))
    if isinstance(value, (bool, list, type(None))):
        return value
    if isinstance(value, int):
        return draw(st.sampled_from([0, 1, -1, 63, 64, 65, 1000, 2**31, -(2**31), 2**62, -(2**62)]))
    if isinstance(value, float):
        return draw(st.sampled_from([0.0, -1.0, 1e30, float("nan"), float("inf")]))
    how = draw(st.sampled_from([
        "dtype", "numbers", "nan", "short", "empty", "transposed", "strided", "expanded", "more",
        "view", "negated", "none",
    ]))  # fmt: skip
    dim = draw(st.integers(0, max(value.ndim - 1, 0)))
    if how == "dtype":
        return value.to(draw(st.sampled_from(DTYPES)))
    if how == "numbers" and not value.dtype.is_floating_point:
        numbers = [0, 1, 2, 3, 64, 127, 128, 2**31 - 1, -1, -(2**31)]
        limits = torch.iinfo(value.dtype)
        new = value.clone().flatten()
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, max(new.numel() - 1, 0)))
            if new.numel():
                new[at] = min(max(draw(st.sampled_from(numbers)), limits.min), limits.max)
        return new.view(value.shape)
    if how == "nan" and value.dtype.is_floating_point and value.numel():
        new = value.clone()
        wrong = [float("nan"), float("inf"), 1e30, -1e38, 1e-42]
        new.view(-1)[draw(st.integers(0, new.numel() - 1))] = draw(st.sampled_from(wrong))
        return new
    if how == "short" and value.ndim:
        return value.narrow(dim, 0, max(value.shape[dim] - 1, 0))
    if how == "empty" and value.ndim:
        return value.narrow(dim, 0, 0)
    if how == "transposed" and value.ndim > 1:
        return value.transpose(0, 1)
    if how == "strided" and value.ndim:
        return torch.stack([value, value], -1)[..., 0]
    if how == "expanded" and value.ndim and value.shape[dim]:
        return value.narrow(dim, 0, 1).expand(value.shape)
    if how == "more":
        return value[None]
    if how == "view" and value.ndim:
        return torch.cat([value, value], dim).narrow(dim, 0, value.shape[dim])
    if how == "negated" and value.dtype.is_floating_point:
        return torch._neg_view(value)
    return value


@pytest.mark.parametrize("op", [*RIGHT, "decode_step_", "select", "gather"])
def test_random_calls(op):
    @settings(
        max_examples=CALLS or 40,
        derandomize=not CALLS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def call_it(data):
        torch.manual_seed(0)
        args = arguments(op)
        for name in data.draw(st.lists(st.sampled_from(sorted(args)), min_size=1, max_size=3)):
            args[name] = spoil(data.draw, args[name])
        tensors = {x: y for x, y in args.items() if isinstance(y, torch.Tensor)}
        before = {x: y.clone() for x, y in tensors.items()}
        refused = False
        try:
            run(op, args)
        except (ValueError, RuntimeError, NotImplementedError, TypeError, OverflowError) as error:
            refused = True
            assert "INTERNAL ASSERT" not in str(error)
        for name, x in before.items():
            if refused or name not in WRITTEN.get(op, ()):
                assert same_numbers(tensors[name], x), name

    call_it()
