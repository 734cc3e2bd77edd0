"""fit_quantizer: basis vectors, ranges of the channels and the mean that centres them."""

from dataclasses import replace

import pytest
import torch

from support import FLOAT_ERROR, assert_same, assert_within, make_inv_freq, make_keys, make_layout
from svdq import ops, reference
from svdq.layout import WIDTHS, PageLayout


def latent_error(keys, basis, mean):
    """Bound on the rounding error of any latent; test_pack.py derives it."""
    dim = keys.shape[2]
    reach = (keys - mean[:, None]).abs().amax() * basis.abs().float().sum(1).amax()
    return (dim + 3) * FLOAT_ERROR * float(reach) + 10 * FLOAT_ERROR * float(keys.abs().amax())


def fourth_power_error(keys, codec, layout):
    """Mean fourth power of the quantization error of every channel's latents, [R]."""
    widths, scale = reference.channel_widths(layout), codec.scale
    latent = reference.latents(keys, codec.basis, codec.mean, layout)
    decoded = (reference.quantize(latent, scale, widths) - (2.0**widths - 1) / 2) * scale.double()
    return (decoded - latent).pow(4).mean(0)


CASES = {
    "post": (64, "post", None),
    "pre": (64, "pre", make_inv_freq(64)),
    "partial-rotary": (80, "pre", make_inv_freq(32)),
    "head-dim-256": (256, "pre", make_inv_freq(256)),
}


@pytest.mark.parametrize(("head_dim", "rope", "inv_freq"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("num_tokens", [1, 64, 4161])
def test_full_ranges(backend, head_dim, rope, inv_freq, num_tokens):
    layout = make_layout(head_dim, [8, 4, 2, 1, 1, 0, 0, 0], 2, rope)
    keys = make_keys(2, num_tokens, head_dim, inv_freq=inv_freq, position=7)
    mean, components, _ = reference.fit_basis(keys, inv_freq, 7)
    args, options = (keys, mean, components, layout), {"inv_freq": inv_freq, "position": 7}
    codec = ops.fit_quantizer(*args, **options, clip=False)
    expected = reference.fit_quantizer(*args, **options, clip=False)
    basis, scale = codec.basis, codec.scale
    assert_same(basis, expected.basis)
    # A range is the difference of two latents, its centre half their sum.
    error = latent_error(keys, basis, mean)
    top = 2.0 ** reference.channel_widths(layout) - 1
    allowed = (2 * error + 4 * FLOAT_ERROR * expected.scale * top) / top
    assert_within(scale, expected.scale, allowed)
    rank = layout.rank // 2
    centring = error * rank**0.5 + rank * FLOAT_ERROR * float(keys.abs().amax())
    assert_within(codec.mean, expected.mean, centring)


def heavy_tailed(keys):
    return torch.distributions.StudentT(3.0).sample(keys.shape) * keys.std(1, keepdim=True)


def skewed(keys):
    return keys.exp()


def two_valued(keys):
    return keys.sign() + keys


def without_gain(codec):
    """The codec whose rows have length 1: the same codes, not unbiased."""
    root = codec.basis.double().norm(dim=1)
    return replace(codec, basis=codec.basis / root[:, None], scale=codec.scale / root)


def errors_by_width(keys, codec, layout):
    """Roots of fourth powers of the error of ranges alone, which compare as squares do: by width,
    by channel."""
    codec = without_gain(codec)
    error = fourth_power_error(keys, codec, layout)
    widths = reference.channel_widths(layout)
    return torch.stack([error[widths == w].sum() for w in WIDTHS]).sqrt(), error.sqrt()


@pytest.mark.parametrize("num_tokens", [300, 4000])
def test_decoded_latents_are_unbiased(backend, num_tokens):
    """<x, decoded> / <x, x> is 1 for every channel, where least errors alone lose up to a third."""
    layout = make_layout(64, [8, 4, 2, 1], 2)
    keys = torch.randn(2, num_tokens, 64)  # of one size, so that no row's rounding adds much
    mean, components, _ = reference.fit_basis(keys)
    codec = ops.fit_quantizer(keys, mean, components, layout)
    shares = []
    for own in (codec, without_gain(codec)):
        latent = reference.latents(keys, without_gain(own).basis, own.mean, layout)
        widths, root = reference.channel_widths(layout), own.basis.double().norm(dim=1)
        codes = reference.quantize(latent, own.scale / root, widths)
        decoded = (codes - (2.0**widths - 1) / 2) * own.scale.double() * root
        shares.append((latent * decoded).sum(0) / latent.square().sum(0))
    # Rounding rows to bfloat16 moves a length by 2^-9 at most; codes that it moves are few.
    assert_within(shares[0], torch.ones(layout.rank), 0.01)
    ones = widths == 1
    assert float((shares[1][ones] - 1).abs().mean()) > 0.05


@pytest.mark.parametrize("shape", [None, heavy_tailed, skewed, two_valued])
@pytest.mark.parametrize("num_tokens", [65, 300, 1000])
def test_clipped_ranges_are_as_good_as_a_fine_search(backend, shape, num_tokens):
    layout = make_layout(64, [8, 4, 2, 1], 2)
    keys = make_keys(2, num_tokens, 64)
    keys = shape(keys) if shape else keys
    mean, components, _ = reference.fit_basis(keys)
    args = (keys, mean, components, layout)
    got, got_channel = errors_by_width(keys, ops.fit_quantizer(*args), layout)
    best, best_channel = errors_by_width(keys, reference.fit_quantizer(*args), layout)
    full, _ = errors_by_width(keys, reference.fit_quantizer(*args, clip=False), layout)
    # The search is coarser than the reference's: 5 % more error is a twentieth of a bit. With few
    # tokens the error jumps as single ones cross a rounding boundary.
    few = num_tokens < 300
    assert (got <= (1.1 if few else 1.05) * best).all(), f"by width {(got / best).tolist()}"
    assert (got <= 1.01 * full).all(), f"by width {(got / full).tolist()}"
    # In one 4-bit channel of 300 tokens a single one that is cut off makes most of the error, and
    # between neighbours of the grid, 3 % of the range or a quarter of a step apart, it changes by
    # tens of per cent.
    if num_tokens >= 1000:
        assert (got_channel <= 1.1 * best_channel).all()
    # Clipping makes few bits useful: at one bit the full range is worse than no code at all.
    assert got[WIDTHS.index(1)] < 0.5 * full[WIDTHS.index(1)]


@pytest.mark.parametrize("num_tokens", [17, 64, 65])
def test_every_token_counts_alike(backend, num_tokens):
    """The order of the tokens makes no difference, whatever number of them a vector holds."""
    layout = PageLayout(64, ((0, 8, 4, 0),), "post")
    keys = make_keys(1, num_tokens, 64)
    mean, components, _ = reference.fit_basis(keys)
    first = ops.fit_quantizer(keys, mean, components, layout).scale
    for shift in (1, 2, 5):
        shifted = keys.roll(shift, dims=1)
        scale = ops.fit_quantizer(shifted, mean, components, layout).scale
        assert_within(scale, first, 1e-4 * first)  # sums of another order differ in the last digits


def test_clipping_samples_long_sequences_evenly(backend):
    """The wide second half must be seen although only 4096 of the tokens are looked at."""
    layout = make_layout(64, [4], 1)
    keys = make_keys(1, 9000, 64, mean=0.0)
    keys[:, 4500:] *= 4
    mean, components, _ = reference.fit_basis(keys)
    args = (keys, mean, components, layout)
    got = fourth_power_error(keys, ops.fit_quantizer(*args), layout).sqrt()
    best = fourth_power_error(keys, reference.fit_quantizer(*args), layout).sqrt()
    # Half of the least error comes from what is cut off, beyond 3.2 deviations: some six of 4096
    # tokens, whose number varies by 40 % between samples. Ranges of the first half alone cut off
    # almost all.
    assert (got <= 1.5 * best).all()
    narrow = reference.fit_quantizer(keys[:, :4500], mean, components, layout)
    assert (fourth_power_error(keys, narrow, layout).sqrt() > 10 * best).all()


@pytest.mark.libraries
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 50])
def test_constant_keys(backend, clip, num_tokens):
    """No variance: the mean alone carries the key, and nothing is NaN."""
    layout = make_layout(64, [8, 4, 2, 1], 1)
    keys = torch.randn(1, 1, 64).expand(1, num_tokens, 64).contiguous()
    mean, components, _ = ops.fit_basis(keys)
    codec = ops.fit_quantizer(keys, mean, components, layout, clip=clip)
    assert_within(codec.mean, keys[:, 0], 1e-5)
    assert (codec.scale >= 0).all()
    assert (codec.scale < 1e-5).all()


@pytest.mark.libraries
def test_heads_have_their_own_ranges(backend):
    layout = PageLayout(64, ((8, 8, 0, 0), (0, 0, 0, 0), (0, 4, 8, 16)))
    keys = make_keys(3, 300, 64)
    mean, components, _ = ops.fit_basis(keys)
    layout = PageLayout(64, layout.bands, "post")
    codec = ops.fit_quantizer(keys, mean, components, layout, clip=False)
    for h, rows in ((0, slice(0, 16)), (2, slice(16, 44))):
        alone = PageLayout(64, (layout.bands[h],), "post")
        one = ops.fit_quantizer(
            keys[h : h + 1], mean[h : h + 1], components[h : h + 1], alone, clip=False
        )
        assert_same(codec.basis[rows], one.basis)
        assert_same(codec.scale[rows], one.scale)
        assert_same(codec.mean[h : h + 1], one.mean)
    assert_same(codec.mean[1], mean[1])


@pytest.mark.parametrize("clip", [True, False])
def test_results_do_not_depend_on_threads(num_threads, clip):
    layout = make_layout(64, [4, 2], 3)
    keys = make_keys(3, 1000, 64)
    mean, components, _ = ops.fit_basis(keys)
    results = []
    for n in (1, 2, 3):
        num_threads(n)
        results.append(ops.fit_quantizer(keys, mean, components, layout, clip=clip))
    for other in results[1:]:
        for name, expected in results[0].tensors().items():
            assert_same(getattr(other, name), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_sample_that_is_not_finite_is_refused(bad):
    """Of many tokens the search sees a sample alone: what is bad there is not passed over."""
    layout = make_layout(64, [4, 2, 0, 0], 2, "post")
    keys = make_keys(2, 5000, 64)
    based = reference.fit_basis(keys)[:2]
    ops.fit_quantizer(keys, *based, layout)
    keys[1, 5, 3] = bad  # the first 64 tokens are always looked at
    with pytest.raises(ValueError, match="svdq::fit_quantizer: keys must be finite"):
        ops.fit_quantizer(keys, *based, layout)
