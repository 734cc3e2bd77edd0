"""Wrong arguments, which an operator must refuse."""

import inspect
from dataclasses import fields

import pytest
import torch

from svdq import ops
from svdq.layout import PageLayout
from svdq.ops import KeyCodec, LogitRules, PackedKeys, Window


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


def noun(cls, args):
    """A noun of :mod:`svdq.ops` from those of these arguments that are its fields."""
    return cls(**{f.name: args[f.name] for f in fields(cls) if f.name in args})


def call(op, args):
    """Call an operator of :mod:`svdq.ops` with arguments named as in its flat schema."""
    args = dict(args)
    if "basis" in args:
        args["codec"] = noun(KeyCodec, args)
    if op in ("attend", "select", "gather"):
        args.setdefault("codec", KeyCodec(None, None, None))  # gather decodes nothing
        args.setdefault("cache_seqlens", None)
        args["packed"] = noun(PackedKeys, args)
    if op == "attend":
        args["rules"] = noun(LogitRules, args)
        args["window"] = Window(*(args[f"window_{name}"] for name in ("keys", "values", "lens")))
    taken = inspect.signature(getattr(ops, op)).parameters
    return getattr(ops, op)(**{name: x for name, x in args.items() if name in taken})


def check_refusal(op, args, *words):
    """The call fails with a message of all these words, and every tensor given is as it was."""
    tensors = {name: x for name, x in args.items() if isinstance(x, torch.Tensor)}
    dense = (name for name, x in tensors.items() if x.is_cpu and not x.is_sparse)
    before = {name: tensors[name].clone() for name in dense}
    message = f"svdq::{op}" + "".join(f"(?=.*(?:{word}))" for word in words)
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        call(op, args)
    for name, x in before.items():
        assert same_bytes(tensors[name], x), f"{op} changed {name} before it failed"
