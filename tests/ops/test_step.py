"""The decode step as torch sees it, and what it refuses; test_cache_static.py has its numbers."""

import pytest
import torch

from support import make_cache, make_layout
from svdq import ops
from svdq.ops.registered import ARGUMENTS


def step_args(rope="post", dtype=torch.float32, length=2, gain=None):
    """Arguments of torch.ops.svdq.decode_step_."""
    layout = make_layout(64, [4, 2], 2, rope, v_bits=4)
    cache, _, _ = make_cache(layout, [70, 10], [3, 5], first_positions=[0, 2], window_dtype=dtype)
    flat = cache.but(sink_tokens=1).flat()
    for name in ("window_keys", "window_values"):
        rows = torch.zeros(2, 2, 80, 64, dtype=dtype)
        rows[:, :, : flat[name].shape[2]] = flat[name].nan_to_num()
        flat[name] = rows
    draw = lambda heads: torch.randn(2, heads, length, 64).to(dtype)  # noqa: E731
    return {
        **flat,
        "query": draw(4),
        "keys": draw(2),
        "values": draw(2),
        "sm_scale": 0.125,
        "gain": gain,
        "residual_length": 8,
        "faults": torch.zeros(2, dtype=torch.int32),
    }


def run(given):
    args = {name: given[name] for name in ARGUMENTS["decode_step_"] if name in given}
    return torch.ops.svdq.decode_step_(**args)


@pytest.mark.parametrize("rope", ["pre", "post", "hybrid"])
def test_opcheck(rope):
    given = step_args(rope, gain=torch.rand(2, 2, 64) + 0.5)
    args = {name: given[name] for name in ARGUMENTS["decode_step_"] if name in given}
    torch.library.opcheck(torch.ops.svdq.decode_step_.default, (), args)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keys": torch.zeros(2, 2, 3, 64)}, "keys must have shape"),
        ({"values": torch.zeros(2, 2, 2, 64).half()}, "values must be Float"),
        ({"query": torch.zeros(2, 4, 0, 64)}, "1 to 64 tokens"),
        ({"query": torch.zeros(2, 4, 65, 64)}, "1 to 64 tokens"),
        ({"residual_length": -1}, "residual_length must not be negative"),
        ({"faults": torch.zeros(3, dtype=torch.int32)}, "faults must have shape"),
        ({"gain": torch.ones(2, 2, 1, 64)}, "gain must have shape"),
        ({"window_lens": torch.tensor([79, 0]).int(), "residual_length": 90}, "the capacity is 80"),
    ],
)
def test_bad_arguments(wrong, message):
    given = step_args()
    before = {x: y.clone() for x, y in given.items() if isinstance(y, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        run(given | wrong)
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor), name


def test_exports_its_name():
    assert "decode_step_" in ops.__all__
