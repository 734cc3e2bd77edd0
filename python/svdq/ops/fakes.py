"""Fake kernels of the operators, for torch.compile and opcheck: shapes, dtypes, devices."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor

from svdq import _C  # noqa: F401  (loads the operators)
from svdq.layout import PAGE_TOKENS, WIDTHS, PageLayout


def _register_fake(name: str, on_host: str | None = None):
    """Register a fake kernel that, like the real one, refuses tensors on different devices.

    The argument ``on_host`` lies on the CPU whatever the others do.
    """

    def register(fake):
        signature = inspect.signature(fake)

        @functools.wraps(fake)
        def checked(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            host = given.pop(on_host, None)
            tensors = [x for x in given.values() if isinstance(x, Tensor)]
            devices = sorted({str(x.device) for x in tensors})
            if len(devices) > 1:
                raise ValueError(
                    f"svdq::{name}: tensors must be on one device, got {' and '.join(devices)}"
                )
            if host is not None and host.device.type != "cpu":
                raise ValueError(f"svdq::{name}: {on_host} must be on cpu, got {host.device}")
            return fake(*args, **kwargs)

        return torch.library.register_fake(f"svdq::{name}")(checked)

    return register


@_register_fake("fit_basis")
def _(keys, inv_freq, position):
    heads, _, dim = keys.shape
    new = lambda *shape: keys.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return new(heads, dim), new(heads, dim, dim), new(heads, dim)


@_register_fake("allocate_bits")
def _(variance, schedule):
    return torch.empty((variance.shape[0], len(WIDTHS)), dtype=torch.int32, device="cpu")


@_register_fake("fit_quantizer")
def _(keys, inv_freq, position, mean, components, layout, clip):
    rank, dim = PageLayout.from_ints(layout).rank, mean.shape[1]
    basis = keys.new_empty((rank, dim), dtype=torch.bfloat16)
    return basis, mean.new_empty((rank,)), torch.empty_like(mean)


@_register_fake("pack_keys_", on_host="page_table")
def _(
    k_pages,
    keys,
    inv_freq,
    position,
    basis,
    scale,
    mean,
    layout,
    page_table,
    slot,
    post_mean=None,
    errors=None,
):
    return None


@_register_fake("residual_keys")
def _(keys, inv_freq, position, basis, scale, mean, layout):
    return keys.new_empty(keys.shape)


@_register_fake("pack_values_", on_host="page_table")
def _(v_pages, values, layout, page_table, slot):
    return None


@_register_fake("append_window_")
def _(window_keys, window_values, keys, values, start):
    return None


@_register_fake("unpack_codes", on_host="page_table")
def _(k_pages, layout, page_table, slot, num_tokens):
    return k_pages.new_empty((num_tokens, PageLayout.from_ints(layout).rank))


@_register_fake("unpack_keys", on_host="page_table")
def _(
    k_pages,
    inv_freq,
    position,
    basis,
    scale,
    mean,
    layout,
    page_table,
    slot,
    num_tokens,
    post_mean=None,
):
    heads, dim = mean.shape
    return mean.new_empty((heads, num_tokens, dim))


@_register_fake("unpack_values", on_host="page_table")
def _(v_pages, layout, page_table, slot, num_tokens):
    pages = PageLayout.from_ints(layout)
    shape = (pages.num_kv_heads, num_tokens, pages.head_dim)
    return v_pages.new_empty(shape, dtype=torch.float32)


@_register_fake("select")
def _(
    query,
    k_pages,
    page_table,
    cache_seqlens,
    basis,
    scale,
    mean,
    layout,
    inv_freq,
    first_position,
    sink_tokens,
    sm_scale,
    budget,
    channels,
    post_mean=None,
    outlier_slots=None,
):
    batch, heads = mean.shape[:2]
    outliers = 0 if outlier_slots is None else outlier_slots.shape[2]
    new = lambda count: cache_seqlens.new_empty((batch, heads, count))  # noqa: E731
    return new(budget + outliers), new(outliers)


@_register_fake("gather")
def _(k_pages, v_pages, page_table, slots, layout):
    pages = slots.shape[0] * -(-slots.shape[2] // PAGE_TOKENS)
    return tuple(pool.new_empty((pages, pool.shape[1])) for pool in (k_pages, v_pages))


@_register_fake("attend")
def _(
    query,
    k_pages,
    v_pages,
    page_table,
    cache_seqlens,
    basis,
    scale,
    mean,
    layout,
    inv_freq,
    first_position,
    window_keys,
    window_values,
    window_lens,
    sink_tokens,
    sm_scale,
    causal,
    post_mean=None,
    outlier_slots=None,
    outlier_keys=None,
    token_slots=None,
):
    out = query.new_empty(query.shape)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@_register_fake("merge")
def _(out_a, lse_a, out_b, lse_b):
    return torch.empty_like(out_a), torch.empty_like(lse_a)
