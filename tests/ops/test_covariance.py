"""fit_basis: mean, orthonormal components and variances, against eigenvectors in float64."""

import pytest
import torch

from support import FLOAT_ERROR, assert_within, make_inv_freq, make_keys
from svdq import ops, reference

pytestmark = pytest.mark.libraries

# A covariance is summed from float32 products, in chunks of 64 * 64 tokens: rounding errors of
# relative size FLOAT_ERROR that add up like a random walk, taken at four deviations. Eigenvalues
# are off by no more than the norm of the error (Weyl).
VARIANCE_ERROR = 4 * 64 * FLOAT_ERROR  # times the trace
# Eigenvectors are rounded to float32 and computed in it: a few roundings a component.
ORTHONORMAL_ERROR = 64 * FLOAT_ERROR


def covariance(keys, inv_freq=None, position=0):
    """Mean [H, D] and covariance [H, D, D] of un-rotated keys in float64."""
    positions = position + torch.arange(keys.shape[1])
    rows = reference.rotate(keys, positions, inv_freq, inverse=True)
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    return mean, centred.mT @ centred / keys.shape[1]


def check_basis(keys, inv_freq=None, position=0, unrotation_error=0.0):
    """Check everything that a basis of these keys must fulfil; returns it.

    Unrotating keys costs up to 8 roundings a component, relative to the key with its mean.
    """
    mean, components, variance = ops.fit_basis(keys, inv_freq, position)
    expected_mean, expected = covariance(keys, inv_freq, position)
    trace = expected.diagonal(dim1=1, dim2=2).sum(1)[:, None]
    key_error = (8 if inv_freq is not None else 2) * FLOAT_ERROR * keys.double().abs().amax()
    error = VARIANCE_ERROR * trace + 2 * key_error * trace.sqrt() + key_error**2

    assert mean.dtype == components.dtype == variance.dtype == torch.float32
    assert_within(mean, expected_mean, key_error + VARIANCE_ERROR * trace.sqrt())
    eye = torch.eye(keys.shape[2]).expand_as(components)
    assert_within(components @ components.mT, eye, ORTHONORMAL_ERROR)
    assert (variance >= 0).all()
    assert (variance.diff(dim=1) <= 0).all()
    exact = torch.linalg.eigvalsh(expected).flip(1)
    assert_within(variance, exact, error)
    # Every row has the variance it claims, and rows are uncorrelated.
    c = components.double()
    assert_within(c @ expected @ c.mT, torch.diag_embed(variance.double()), 2 * error[..., None])
    largest = components.gather(2, components.abs().argmax(2, keepdim=True))
    assert (largest > 0).all()
    return mean, components, variance


@pytest.mark.parametrize("num_tokens", [2, 63, 64, 65, 4097])
@pytest.mark.parametrize("inv_freq", [None, make_inv_freq(64)], ids=["post", "pre"])
def test_basis(backend, num_tokens, inv_freq):
    keys = make_keys(3, num_tokens, 64, inv_freq=inv_freq, position=11)
    check_basis(keys, inv_freq, 11)


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256, 512])
def test_head_dims(backend, head_dim):
    check_basis(make_keys(2, 300, head_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inv_freq", [None, make_inv_freq(64)], ids=["post", "pre"])
def test_dtypes(backend, dtype, inv_freq):
    check_basis(make_keys(2, 200, 64, inv_freq=inv_freq).to(dtype), inv_freq)


def test_strided_keys(backend):
    # [T, H, D] as projections leave them, a part of a longer buffer.
    keys = make_keys(3, 130, 64).transpose(0, 1).contiguous()[5:105].transpose(0, 1)
    for got, expected in zip(ops.fit_basis(keys), ops.fit_basis(keys.contiguous()), strict=True):
        assert torch.equal(got, expected)
    check_basis(keys)


def test_pre_mode_equals_post_mode_on_unrotated_keys(backend):
    inv_freq, position = make_inv_freq(64), 1000
    raw = make_keys(2, 500, 64)
    keys = reference.rotate(raw, position + torch.arange(500), inv_freq).float()
    pre, post = ops.fit_basis(keys, inv_freq, position), ops.fit_basis(raw)
    # Rotated and unrotated, keys carry some ten roundings.
    assert_within(pre[0], post[0], 10 * FLOAT_ERROR * float(raw.abs().amax()))
    trace = post[2].sum(1, keepdim=True)
    assert_within(pre[2], post[2], 2 * VARIANCE_ERROR * trace)
    # The first components are well apart, so they are the same vectors up to their sign.
    overlap = (pre[1][:, :8] * post[1][:, :8]).sum(2).abs()
    assert_within(overlap, torch.ones(2, 8), 1e-3)


@pytest.mark.parametrize("rotary_dim", [2, 16, 40])
def test_partial_rotary(backend, rotary_dim):
    inv_freq = make_inv_freq(rotary_dim)
    keys = make_keys(2, 200, 80, inv_freq=inv_freq, position=3)
    check_basis(keys, inv_freq, 3)


@pytest.mark.parametrize("position", [-200, 0, 1_000_000])
def test_positions(backend, position):
    inv_freq = make_inv_freq(64, theta=5e5)
    keys = make_keys(1, 200, 64, inv_freq=inv_freq, position=position)
    check_basis(keys, inv_freq, position)


def test_mean_far_from_zero(backend):
    """Biases of key projections put means at a hundred deviations: no digits may cancel."""
    keys = make_keys(2, 1000, 64, mean=100.0)
    _, _, variance = check_basis(keys)
    exact = torch.linalg.eigvalsh(covariance(keys)[1]).flip(1)
    # The sum of squares about zero would be off by more than the smaller half of all variances.
    assert_within(variance[:, :32] / exact[:, :32], torch.ones(2, 32), 1e-3)


def test_keys_in_a_subspace(backend):
    keys = torch.randn(2, 300, 3) @ torch.randn(2, 3, 64) + torch.randn(2, 1, 64)
    _, _, variance = check_basis(keys)
    assert (variance[:, 3:] <= 1e-6 * variance[:, :1]).all()


@pytest.mark.parametrize("num_tokens", [1, 2, 100])
def test_constant_keys(backend, num_tokens):
    keys = torch.randn(2, 1, 64).expand(2, num_tokens, 64).contiguous()
    mean, _, variance = check_basis(keys)
    assert_within(mean, keys[:, 0], 2 * FLOAT_ERROR * float(keys.abs().amax()))
    assert (variance < 1e-12).all()


# Factors of all channels but some: squares of the smallest underflow float32.
@pytest.mark.parametrize("factor", [1e-4, 1e-10, 1e-19, 1e-22, 1e-23, 0.0])
@pytest.mark.parametrize("num_large", [1, 2, 31, 63])
def test_channels_of_very_different_size(backend, factor, num_large):
    keys = torch.randn(3, 200, 64)
    keys[:, :, num_large:] *= factor
    keys[1] = keys[1] @ torch.linalg.qr(torch.randn(64, 64)).Q
    keys[2] *= torch.logspace(0, -30, 64)
    check_basis(keys)


def test_a_block_between_channels_that_are_zero(backend):
    """As pruned keys are after RoPE is undone: variances fall by 2^50 in four channels."""
    channels = [0, 1, 32, 33]
    for _ in range(20):
        keys = torch.zeros(1, 392, 64)
        keys[:, :, channels] = torch.randn(392, 4) * torch.tensor([1.0, 1e-5, 1e-9, 1e-13])
        keys[:, :, channels] = keys[:, :, channels] @ torch.randn(4, 4)
        check_basis(keys * 10.0 ** torch.randint(-12, 12, (1,)))


def test_zero_keys(backend):
    mean, _, variance = check_basis(torch.zeros(1, 70, 32))
    assert not mean.any()
    assert not variance.any()


def test_components_reconstruct_the_keys(backend):
    """All components and no quantization lose nothing (SVDq, section 4.2)."""
    keys = make_keys(2, 100, 64)
    mean, components, _ = (x.double() for x in ops.fit_basis(keys))
    latent = (keys.double() - mean[:, None]) @ components.mT
    again = latent @ components + mean[:, None]
    assert_within(again, keys, 64 * ORTHONORMAL_ERROR)


def test_results_do_not_depend_on_threads(num_threads):
    keys = make_keys(3, 5000, 64)
    results = []
    for n in (1, 2, 3):
        num_threads(n)
        results.append(ops.fit_basis(keys)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.libraries
def test_keys_whose_squares_overflow_are_refused():
    with pytest.raises(ValueError, match="svdq::fit_basis: keys must be small enough for float32"):
        ops.fit_basis(torch.randn(1, 70, 64) * 1e30)
