"""Operators that fit a codec to keys."""

from __future__ import annotations

from torch import Tensor

from svdq.layout import PageLayout
from svdq.ops.nouns import KeyCodec
from svdq.ops.registered import call


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
    return call("fit_basis", keys=keys, inv_freq=inv_freq, position=position)


def allocate_bits(variance: Tensor, schedule: list[int]) -> Tensor:
    """Give each latent channel a width by the paper's equal groups (SVDq, section 4.3).

    The D channels are cut into ``len(schedule)`` equal groups in order of variance and group g gets
    ``schedule[g]`` bits. Channels of equal width that would not end on a whole line of codes are
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
    return call("allocate_bits", variance=variance, schedule=schedule)


def fit_quantizer(
    keys: Tensor,
    mean: Tensor,
    components: Tensor,
    layout: PageLayout,
    *,
    inv_freq: Tensor | None = None,
    position: int = 0,
    clip: bool = True,
) -> KeyCodec:
    """Choose basis vectors, one scale per channel and the mean that centres the codes.

    With ``clip`` a channel's range is the one with the least sum of fourth powers of the error over
    a grid of multiples of its standard deviation (over at most 64 evenly spaced chunks of 64
    tokens); without, it is min to max over all tokens.

    Parameters
    ----------
    keys, inv_freq, position : as for :func:`fit_basis`.
    mean, components : of :func:`fit_basis`.
    layout : widths of every head's channels; ``rope`` is ``"pre"`` or ``"post"``. The parts of a
        hybrid layout are fitted one after the other (:func:`svdq.fit.bases.fit_keys`).

    Returns
    -------
    codec : the coded rows of ``components``, head after head; their scales; ``mean`` plus the
        centre of every channel's range; ``inv_freq``.
    """
    basis, scale, centred_mean = call(
        "fit_quantizer",
        keys=keys,
        inv_freq=inv_freq,
        position=position,
        mean=mean,
        components=components,
        layout=layout.ints,
        clip=clip,
    )
    return KeyCodec(basis, scale, centred_mean, inv_freq=inv_freq)


def residual_keys(
    keys: Tensor, codec: KeyCodec, layout: PageLayout, *, position: int = 0
) -> Tensor:
    """Rotated keys less their decoded pre-RoPE channels, to fit a hybrid layout's rest to.

    Parameters
    ----------
    keys, position : as for :func:`fit_basis`.
    codec : of one sequence; the post-RoPE rows and ``post_mean`` are not read.
    layout : a hybrid layout.

    Returns
    -------
    [H, T, D] in the keys' dtype; the rotated mean is taken off as well.
    """
    return call("residual_keys", codec, keys=keys, position=position, layout=layout.ints)
