"""Operators that fit bases and write, read or check what is stored."""

from __future__ import annotations

from torch import Tensor

from svdq.layout import PageLayout
from svdq.ops import registered


def fit_basis(
    keys: Tensor, inv_freq: Tensor | None = None, position: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit every head's latent basis: mean and covariance eigenvectors (SVDq, section 4.2).

    The eigenvectors of ``C^T C / T``, with ``C`` the centred keys, are the right singular vectors
    of ``C``; the variances are its squared singular values over T. The sign of each vector is fixed
    so that its largest component by magnitude is positive.

    Parameters
    ----------
    keys : [H, T, D] float32, bfloat16 or float16, rotated; T >= 1; last dimension contiguous.
    inv_freq : [rotary_dim / 2] float32 to fit un-rotated keys (``rope="pre"``); None for rotated
        keys.
    position : position of ``keys[:, 0]``.

    Returns
    -------
    mean : [H, D] float32.
    components : [H, D, D] float32, row j is the j-th eigenvector, largest variance first.
    variance : [H, D] float32, in descending order.
    """
    return registered.OPERATORS.fit_basis(keys, inv_freq, position)


def allocate_bits(variance: Tensor, schedule: list[int]) -> Tensor:
    """Give each latent channel a width by the paper's equal groups (SVDq, section 4.3).

    The D channels are cut into ``len(schedule)`` equal groups in order of variance and group g gets
    ``schedule[g]`` bits. Where a run of equal widths would not end on a whole line of codes it is
    extended by the next channels, so bits are rounded up, except for 1-bit channels at the very end
    (``layout.k_bits`` tells).

    Parameters
    ----------
    variance : [H, D] float32 channel variances of :func:`fit_basis`.
    schedule : widths per group, each of 8, 4, 2, 1, 0, not increasing, not all zero; at most D
        groups.

    Returns
    -------
    bands : [H, 4] int32 on the CPU: channels at 8, 4, 2 and 1 bits.
    """
    return registered.OPERATORS.allocate_bits(variance, schedule)


def fit_quantizer(
    keys: Tensor,
    mean: Tensor,
    components: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose basis rows, one scale per channel and the mean that centres the codes.

    With ``clip`` a channel's range is the one with the least sum of fourth powers of the error over
    a grid of multiples of its standard deviation (over at most 64 evenly spaced runs of 64 tokens);
    without, it is min to max over all tokens.

    Parameters
    ----------
    keys, inv_freq, position : as for :func:`fit_basis`.
    mean, components : of :func:`fit_basis`.
    layout : widths of every head's channels; ``rope`` is ``"pre"`` or ``"post"``. The parts of a
        hybrid layout are fitted one after the other (:func:`svdq.fitting.fit_keys`).

    Returns
    -------
    basis : [R, D] bfloat16, the coded rows of ``components``, head after head.
    scale : [R] float32, distance between neighbouring codes of a channel.
    mean : [H, D] float32, ``mean`` plus the centre of every channel's range.
    """
    return registered.OPERATORS.fit_quantizer(
        keys, inv_freq, position, mean, components, layout.ints, clip
    )


def pack_keys_(
    k_pages: Tensor,
    keys: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    inv_freq: Tensor | None = None,
    position: int = 0,
    post_mean: Tensor | None = None,
    errors: Tensor | None = None,
) -> None:
    """Project keys on the basis, quantize and write their codes into pages: prefill or append.

    ``code = clamp(round((key - mean) . basis_j / scale_j + mid), 0, 2^b - 1)`` with
    ``mid = (2^b - 1) / 2``. Slots outside ``slot .. slot + T - 1`` keep their codes. With a hybrid
    layout that codes the core channels, of un-rotated keys; what they leave of the rotated keys,
    less ``post_mean``, is coded as tail channels.

    Parameters
    ----------
    k_pages : [P, layout.k_page_bytes] uint8, contiguous; written.
    keys : [H, T, D] float32, bfloat16 or float16, rotated, finite; last dimension contiguous.
    basis, scale, mean : of :func:`fit_quantizer`, or of :func:`svdq.fitting.fit_keys`.
    page_table : [N] int32 on the CPU, pages of this sequence in order; ``64 * N >= slot + T``.
    slot : slot of ``keys[:, 0]`` in the sequence.
    inv_freq, position : as for :func:`fit_basis`.
    post_mean : [H, D] float32 of :func:`svdq.fitting.fit_keys`, for hybrid layouts alone.
    errors : [H, T] float32, contiguous; if given, the squared error of every decoded key is written
        to it.
    """
    registered.OPERATORS.pack_keys_(
        k_pages,
        keys,
        inv_freq,
        position,
        basis,
        scale,
        mean,
        layout.ints,
        page_table,
        slot,
        post_mean,
        errors,
    )


def residual_keys(
    keys: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    inv_freq: Tensor | None = None,
    position: int = 0,
) -> Tensor:
    """What the core channels of a hybrid layout leave of rotated keys, to fit the tail to.

    Parameters
    ----------
    keys, inv_freq, position : as for :func:`fit_basis`.
    basis, scale, mean : [R, D] bfloat16, [R] float32, [H, D] float32; the tail's rows are not read.

    Returns
    -------
    [H, T, D] in the keys' dtype: keys less their decoded core, the rotated mean included.
    """
    return registered.OPERATORS.residual_keys(
        keys, inv_freq, position, basis, scale, mean, layout.ints
    )


def pack_values_(
    v_pages: Tensor, values: Tensor, layout: PageLayout, page_table: Tensor, slot: int
) -> None:
    """Quantize values per token and group of ``layout.v_group_size`` channels, or copy them.

    Parameters
    ----------
    v_pages : [P, layout.v_page_bytes] uint8 for 2 and 4 bits; [P, H * 64 * D] in the values' dtype
        for 16 (bfloat16, float16) and 32 (float32) bits; written.
    values : [H, T, D] float32, bfloat16 or float16, finite; last dimension contiguous.
    page_table, slot : as for :func:`pack_keys_`.
    """
    registered.OPERATORS.pack_values_(v_pages, values, layout.ints, page_table, slot)


def unpack_codes(
    k_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Read key codes, for inspection: [num_tokens, R] uint8, channels in the order of ``basis``."""
    return registered.OPERATORS.unpack_codes(k_pages, layout.ints, page_table, slot, num_tokens)


def unpack_keys(
    k_pages: Tensor,
    basis: Tensor,
    scale: Tensor,
    mean: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    slot: int,
    num_tokens: int,
    inv_freq: Tensor | None = None,
    position: int = 0,
    post_mean: Tensor | None = None,
) -> Tensor:
    """Decode keys, for inspection: [H, num_tokens, D] float32, rotated to their positions.

    ``position`` is the position of slot ``slot``; other arguments as for :func:`pack_keys_`.
    """
    return registered.OPERATORS.unpack_keys(
        k_pages,
        inv_freq,
        position,
        basis,
        scale,
        mean,
        layout.ints,
        page_table,
        slot,
        num_tokens,
        post_mean,
    )


def unpack_values(
    v_pages: Tensor, layout: PageLayout, page_table: Tensor, slot: int, num_tokens: int
) -> Tensor:
    """Decode values, for inspection: [H, num_tokens, D] float32."""
    return registered.OPERATORS.unpack_values(v_pages, layout.ints, page_table, slot, num_tokens)


def append_window_(
    window_keys: Tensor, window_values: Tensor, keys: Tensor, values: Tensor, start: int
) -> None:
    """Copy new tokens into one sequence's exact rows, after checking that all of them are finite.

    Parameters
    ----------
    window_keys, window_values : [H, E, D], one dtype; rows ``start .. start + T - 1`` are written.
    keys, values : [H, T, D] of the same dtype; last dimension contiguous.
    """
    registered.OPERATORS.append_window_(window_keys, window_values, keys, values, start)
