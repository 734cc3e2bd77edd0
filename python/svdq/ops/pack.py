"""Operators that write keys and values into pages and the window, and read them back."""

from __future__ import annotations

from torch import Tensor

from svdq.layout import PageLayout
from svdq.ops.nouns import KeyCodec
from svdq.ops.registered import call


def pack_keys_(
    k_pages: Tensor,
    keys: Tensor,
    codec: KeyCodec,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    *,
    position: int = 0,
    errors: Tensor | None = None,
) -> None:
    """Project keys on the basis, quantize and write their codes into pages: prefill or append.

    ``code = clamp(round((key - mean) . basis_j / scale_j + mid), 0, 2^b - 1)`` with
    ``mid = (2^b - 1) / 2``. Slots outside ``slot .. slot + T - 1`` keep their codes. A hybrid
    layout codes the un-rotated keys in its pre-RoPE channels, and what those leave of the rotated
    keys, less ``post_mean``, in its post-RoPE channels.

    Parameters
    ----------
    k_pages : [P, layout.k_page_bytes] uint8, contiguous; written.
    keys : [H, T, D] float32, bfloat16 or float16, rotated, finite; last dimension contiguous.
    codec : of this sequence.
    layout : layout of the pages.
    page_table : [N] int32 on the CPU, pages of this sequence in order; ``64 * N >= slot + T``.
    slot : slot of ``keys[:, 0]`` in the sequence.
    position : position of ``keys[:, 0]``.
    errors : [H, T] float32, contiguous; if given, the squared error of every decoded key is written
        to it.
    """
    call(
        "pack_keys_",
        codec,
        k_pages=k_pages,
        keys=keys,
        position=position,
        layout=layout.ints,
        page_table=page_table,
        slot=slot,
        errors=errors,
    )


def pack_values_(
    v_pages: Tensor, values: Tensor, layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Rotate and quantize values, with a scale for each token of a head, or copy them.

    A packed token's code is unbiased along the token: up to the rounding of the scale to a byte,
    the product of values and decoded values is the values' square (kernels/rotation.h).

    Parameters
    ----------
    v_pages : [P, layout.v_page_bytes] uint8 for packed values; [P, H * 64 * D] in the values' dtype
        for 16 (bfloat16, float16) and 32 (float32) bits; written.
    values : [H, T, D] float32, bfloat16 or float16, finite; last dimension contiguous.
    page_table, slot : as for :func:`pack_keys_`.
    """
    call(
        "pack_values_",
        v_pages=v_pages,
        values=values,
        layout=layout.ints,
        page_table=page_table,
        slot=slot,
    )


def append_window_(
    window_keys: Tensor, window_values: Tensor, keys: Tensor, values: Tensor, start: int
) -> None:
    """Copy new tokens into one sequence's window, after checking that all of them are finite.

    Parameters
    ----------
    window_keys, window_values : [H, E, D], one dtype; tokens ``start .. start + T - 1`` are
        written.
    keys, values : [H, T, D] of the same dtype; last dimension contiguous.
    start : first token of the window to write.
    """
    call(
        "append_window_",
        window_keys=window_keys,
        window_values=window_values,
        keys=keys,
        values=values,
        start=start,
    )


def unpack_codes(
    k_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Read key codes: [num_tokens, R] uint8, channels in the order of ``basis``."""
    return call(
        "unpack_codes",
        k_pages=k_pages,
        layout=layout.ints,
        page_table=page_table,
        slot=slot,
        num_tokens=num_tokens,
    )


def unpack_keys(
    k_pages: Tensor,
    codec: KeyCodec,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    num_tokens: int,
    *,
    position: int = 0,
) -> Tensor:
    """Decode keys: [H, num_tokens, D] float32, rotated to their positions.

    ``position`` is the position of slot ``slot``; other arguments as for :func:`pack_keys_`.
    """
    return call(
        "unpack_keys",
        codec,
        k_pages=k_pages,
        position=position,
        layout=layout.ints,
        page_table=page_table,
        slot=slot,
        num_tokens=num_tokens,
    )


def unpack_values(
    v_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Decode values: [H, num_tokens, D] float32."""
    return call(
        "unpack_values",
        v_pages=v_pages,
        layout=layout.ints,
        page_table=page_table,
        slot=slot,
        num_tokens=num_tokens,
    )
