"""Wrong arguments, and how an operator must refuse them."""

import pytest
import torch

from svdq import ops
from svdq.layout import PageLayout


class Bits(PageLayout):
    """A layout whose integers were read from somewhere else and are wrong."""

    def __new__(cls, ints):
        wrong = object.__new__(cls)
        object.__setattr__(wrong, "ints", ints)
        return wrong

    def __init__(self, ints):
        pass


def with_int(layout, at, value):
    ints = list(layout.ints)
    ints[at] = value
    return Bits(ints)


def spoiled(tensor, value):
    """A copy with one wrong number, the last."""
    copy = tensor.clone()
    copy.view(-1)[-1] = value
    return copy


def strided(tensor):
    """The same numbers, none of which are neighbours."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_refusal(op, args, *words):
    """The call fails with a message of all these words, and every tensor given is as it was."""
    tensors = {name: x for name, x in args.items() if isinstance(x, torch.Tensor)}
    dense = (name for name, x in tensors.items() if x.is_cpu and not x.is_sparse)
    before = {name: tensors[name].clone() for name in dense}
    message = f"svdq::{op}" + "".join(f"(?=.*(?:{word}))" for word in words)
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        getattr(ops, op)(**args)
    for name, x in before.items():
        assert same_bytes(tensors[name], x), f"{op} changed {name} before it failed"
