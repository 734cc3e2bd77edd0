"""Fake kernels of the operators, for torch.compile and opcheck: shapes, dtypes, devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svdq.layout import PAGE_TOKENS, WIDTHS, PageLayout
from svdq.ops.registered import ARGUMENTS

# The pack and unpack stages read their page table on the host.
HOST_TABLES = ("pack_keys_", "pack_values_", "unpack_codes", "unpack_keys", "unpack_values")


def _register_fake(name: str) -> Callable:
    """Register a fake kernel, which takes the arguments that its result depends on by name.

    Like the real kernel it refuses tensors on different devices.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        wanted = fake.__code__.co_varnames[: fake.__code__.co_argcount]

        def checked(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(ARGUMENTS[name], args, strict=False)) | kwargs
            _check_devices(name, given)
            return fake(*(given.get(argument) for argument in wanted))

        return torch.library.register_fake(f"svdq::{name}")(checked)

    return register


def _check_devices(name: str, given: dict[str, Any]) -> None:
    on_device = dict(given)
    table = on_device.pop("page_table", None) if name in HOST_TABLES else None
    devices = sorted({str(x.device) for x in on_device.values() if isinstance(x, Tensor)})
    if len(devices) > 1:
        raise ValueError(
            f"svdq::{name}: tensors must be on one device, got {' and '.join(devices)}"
        )
    if table is not None and table.device.type != "cpu":
        raise ValueError(f"svdq::{name}: page_table must be on cpu, got {table.device}")


@_register_fake("fit_basis")
def _(keys):
    heads, _, dim = keys.shape
    new = lambda *shape: keys.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return new(heads, dim), new(heads, dim, dim), new(heads, dim)


@_register_fake("allocate_bits")
def _(variance):
    return torch.empty((variance.shape[0], len(WIDTHS)), dtype=torch.int32, device="cpu")


@_register_fake("fit_quantizer")
def _(keys, mean, layout):
    rank, dim = PageLayout.from_ints(layout).rank, mean.shape[1]
    basis = keys.new_empty((rank, dim), dtype=torch.bfloat16)
    return basis, mean.new_empty((rank,)), torch.empty_like(mean)


@_register_fake("pack_keys_")
def _():
    return None


@_register_fake("residual_keys")
def _(keys):
    return keys.new_empty(keys.shape)


@_register_fake("pack_values_")
def _():
    return None


@_register_fake("append_window_")
def _():
    return None


@_register_fake("unpack_codes")
def _(k_pages, layout, num_tokens):
    return k_pages.new_empty((num_tokens, PageLayout.from_ints(layout).rank))


@_register_fake("unpack_keys")
def _(mean, num_tokens):
    heads, dim = mean.shape
    return mean.new_empty((heads, num_tokens, dim))


@_register_fake("unpack_values")
def _(v_pages, layout, num_tokens):
    pages = PageLayout.from_ints(layout)
    shape = (pages.num_kv_heads, num_tokens, pages.head_dim)
    return v_pages.new_empty(shape, dtype=torch.float32)


@_register_fake("select")
def _(mean, cache_seqlens, budget, outlier_slots):
    batch, heads = mean.shape[:2]
    outliers = 0 if outlier_slots is None else outlier_slots.shape[2]
    new = lambda count: cache_seqlens.new_empty((batch, heads, count))  # noqa: E731
    return new(budget + outliers), new(outliers)


@_register_fake("gather")
def _(k_pages, v_pages, slots):
    pages = slots.shape[0] * -(-slots.shape[2] // PAGE_TOKENS)
    return tuple(pool.new_empty((pages, pool.shape[1])) for pool in (k_pages, v_pages))


@_register_fake("attend")
def _(query):
    out = query.new_empty(query.shape)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@_register_fake("decode_step_")
def _(query):
    return query.new_empty(query.shape)


@_register_fake("merge")
def _(out_a, lse_a):
    return torch.empty_like(out_a), torch.empty_like(lse_a)
