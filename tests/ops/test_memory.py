"""Tensors whose memory is not what it seems: lazy signs, storages that are gone, shared memory."""

import subprocess
import sys

import pytest
import torch
from test_bad_input import KEYS, RIGHT
from test_step import step_args

from refusals import call, check_refusal, same_bytes
from svdq.ops.registered import ARGUMENTS, NAMES

WRITTEN = {
    "pack_keys_": ("k_pages", "errors"),
    "pack_values_": ("v_pages",),
    "append_window_": ("window_keys", "window_values"),
    "decode_step_": (
        "k_pages", "v_pages", "cache_seqlens", "window_keys", "window_values", "window_lens",
        "faults",
    ),
}  # fmt: skip


def right(op):
    """Right arguments of an operator, all that it writes among them."""
    if op == "decode_step_":
        return step_args(gain=torch.rand(2, 2, 64) + 0.5)
    args = RIGHT[op]()
    if op == "pack_keys_":
        args["errors"] = torch.zeros(KEYS.shape[:2])
    return args


def run(op, args):
    if op == "decode_step_":
        return torch.ops.svdq.decode_step_(**{x: y for x, y in args.items() if x in ARGUMENTS[op]})
    return call(op, args)


def refused(op, args, *words):
    """The call fails with all these words and changes nothing."""
    if op != "decode_step_":
        return check_refusal(op, args, *words)
    tensors = {name: x for name, x in args.items() if isinstance(x, torch.Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}
    message = f"svdq::{op}" + "".join(f"(?=.*(?:{word}))" for word in words)
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        run(op, args)
    assert all(same_bytes(tensors[name], x) for name, x in before.items())
    return None


def test_every_operator_that_writes_is_tested():
    assert {name for name in NAMES if name.endswith("_")} == set(WRITTEN)


FLOATS = [
    (op, name)
    for op in (*RIGHT, "decode_step_")
    for name, x in right(op).items()
    if isinstance(x, torch.Tensor) and x.dtype == torch.float32
]


@pytest.mark.parametrize(("op", "name"), FLOATS)
def test_lazily_negated_tensors(op, name):
    """Taken like the same numbers in memory or, by operators that write, refused."""
    args = right(op)
    lazy = torch.complex(torch.zeros_like(args[name]), -args[name].nan_to_num()).conj().imag
    assert lazy.is_neg() and lazy.shape == args[name].shape
    given = {**args, name: lazy}
    if op in WRITTEN:
        with pytest.raises(ValueError, match=f"svdq::{op}: .*{name} must .*"):
            run(op, given)
    else:
        # The imaginary parts of complex numbers lie apart, which some arguments may not.
        try:
            run(op, given)
        except ValueError as error:
            assert "contiguous" in str(error)


@pytest.mark.parametrize(
    "lazy",
    [lambda x: torch._efficientzerotensor(x.shape), lambda x: torch._neg_view(x)],
    ids=["zero", "negated"],
)
@pytest.mark.parametrize(("op", "name"), [at for at in FLOATS if at[0] in WRITTEN])
def test_lazy_tensors_that_lie_like_others(op, name, lazy):
    args = right(op)
    with pytest.raises(ValueError, match=f"svdq::{op}: {name} must hold .* lazily"):
        run(op, {**args, name: lazy(args[name])})


@pytest.mark.parametrize(("op", "name"), [
    (op, name) for op in (*RIGHT, "decode_step_") for name, x in right(op).items()
    if isinstance(x, torch.Tensor) and (op, name) != ("allocate_bits", "variance")
])  # fmt: skip
def test_storages_that_were_given_back(op, name):
    args = right(op)
    gone = args[name].clone()
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"svdq::{op}: {name} must hold its numbers in memory"):
        run(op, {**args, name: gone})


def pairs():
    """Every tensor that an operator writes, with every other tensor of it."""
    for op, written in WRITTEN.items():
        args = right(op)
        for out in written:
            for other, x in args.items():
                if isinstance(x, torch.Tensor) and other != out:
                    yield op, out, other


@pytest.mark.parametrize(("op", "out", "other"), list(pairs()))
def test_an_argument_inside_an_output(op, out, other):
    args = right(op)
    # One buffer holds the output and, over its first or last bytes, the other argument.
    sizes = [args[name].numel() * args[name].itemsize for name in (out, other)]
    start = max(sizes[0] - sizes[1], 0) // 16 * 16
    buffer = torch.zeros(start + max(sizes) + 16, dtype=torch.uint8)
    given = {}
    for name, first, size in ((out, 0, sizes[0]), (other, start, sizes[1])):
        part = buffer[first : first + size].view(args[name].dtype).view(args[name].shape)
        given[name] = part.copy_(args[name].nan_to_num())
    given[out].copy_(args[out].nan_to_num())
    words = ["share memory"] if torch.equal(given[other], args[other].nan_to_num()) else []
    refused(op, {**args, **given}, *words)


def test_outputs_that_overlap_themselves():
    args = right("append_window_")
    one = torch.zeros(1, 80, 64).expand(2, 80, 64)
    with pytest.raises(ValueError, match="window_keys is written to"):
        run("append_window_", {**args, "window_keys": one})
    rolling = torch.zeros(5000).as_strided((2, 80, 64), (2048, 16, 1))
    with pytest.raises(ValueError, match="window_values is written to"):
        run("append_window_", {**args, "window_values": rolling})


def test_neighbours_in_one_buffer_are_taken():
    """Keys and values of a window that lie between each other share no byte."""
    args = right("append_window_")
    both = torch.zeros(2, 2, 80, 64)
    run("append_window_", {**args, "window_keys": both[:, 0], "window_values": both[:, 1]})
    assert torch.equal(both[:, 0, 3:73], args["keys"])
    assert torch.equal(both[:, 1, 3:73], args["values"])
    rows = torch.zeros(2, 160, 64)
    run("append_window_", {
        **args, "window_keys": rows[:, ::2], "window_values": rows[:, 1::2],
    })  # fmt: skip
    assert torch.equal(rows[:, 6:146:2], args["keys"])


SPOILED = """
import torch
from svdq import ops
from svdq.layout import PageLayout
layout = PageLayout(16, ((4, 4, 0, 0),), "post", 4)
pages = torch.zeros(4, layout.v_page_bytes, dtype=torch.uint8)
table = pages.view(-1)[:16].view(torch.int32)
table.copy_(torch.arange(4))
for _ in range(20):
    try:
        ops.pack_values_(pages, torch.randn(1, 256, 16) * 100, layout, table, 0)
    except ValueError as error:
        print("refused", error)
        break
"""


def test_a_page_table_in_its_pool_does_not_end_the_process():
    done = subprocess.run([sys.executable, "-c", SPOILED], capture_output=True, text=True)
    assert done.returncode == 0 and "must not share memory with page_table" in done.stdout
