"""fit_keys: the codec of keys for any layout, the two spaces of a hybrid layout included."""

import pytest
import torch

from support import assert_orthogonal, assert_same, make_inv_freq, make_keys, make_layout, rms
from svdq import ops, reference
from svdq.fit import bases as fitting
from svdq.fit.bases import fit_keys, thinned
from svdq.fit.pre_channels import PreChannels
from svdq.layout import PageLayout

NONE = (0, 0, 0, 0)


def coded_error(keys, layout, inv_freq):
    """Root mean square of what coding leaves of the keys."""
    codec = fit_keys(keys, layout, inv_freq, 5)
    tokens = keys.shape[1]
    table = torch.arange(-(-tokens // 64), dtype=torch.int32)
    k_pages = torch.zeros(len(table), layout.k_page_bytes, dtype=torch.uint8)
    where = (layout, table, 0)
    ops.pack_keys_(k_pages, keys, codec, *where, position=5)
    decoded = ops.unpack_keys(k_pages, codec, *where, tokens, position=5)
    return rms(decoded - keys) / rms(keys - keys.mean(1, keepdim=True))


@pytest.mark.libraries
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_one_space_is_fitted_by_its_operators(backend, rope):
    layout = make_layout(64, [4, 2, 0, 0], 2, rope)
    inv_freq = make_inv_freq(64) if rope == "pre" else None
    keys = make_keys(2, 300, 64, inv_freq=inv_freq, position=5)
    codec = fit_keys(keys, layout, inv_freq, 5, clip=False)
    mean, components, _ = ops.fit_basis(keys, inv_freq, 5)
    options = {"inv_freq": inv_freq, "position": 5, "clip": False}
    expected = ops.fit_quantizer(keys, mean, components, layout, **options)
    assert codec.post_mean is None
    for name, want in expected.tensors().items():
        assert_same(getattr(codec, name), want)


HYBRID = {
    "mixed": make_layout(64, [4, 2, 0, 0], 2, "hybrid"),
    "rotated-mean": make_layout(64, [4, 2, 0, 0], 2, "hybrid", pre_bands=(NONE, NONE)),
    "pre-alone": PageLayout(64, (NONE, NONE), "hybrid", pre_bands=((4, 8, 4, 8),) * 2),
    "heads-of-different-size": PageLayout(
        64, ((0, 16, 0, 0), NONE, NONE), "hybrid", pre_bands=(NONE, (0, 8, 8, 0), NONE)
    ),
}


@pytest.mark.libraries
@pytest.mark.parametrize("name", HYBRID)
def test_hybrid_fits_its_pre_and_then_its_post_channels(backend, name):
    layout = HYBRID[name]
    inv_freq = make_inv_freq(64)
    keys = make_keys(layout.num_kv_heads, 700, 64, inv_freq=inv_freq, position=5)
    codec = fit_keys(keys, layout, inv_freq, 5)
    expected = reference.fit_keys(keys, layout, inv_freq, 5)
    shapes = [[x.shape for x in own.tensors().values()] for own in (codec, expected)]
    assert shapes[0] == shapes[1]
    basis, scale = codec.basis, codec.scale
    assert (basis.dtype, scale.dtype) == (torch.bfloat16, torch.float32)
    pre, post = reference.part_slices(layout)
    for h in range(layout.num_kv_heads):
        for at in (pre[h], post[h]):
            assert_orthogonal(basis[at])
        # The pre-RoPE channels are fitted as a layout of them alone is.
        assert torch.allclose(scale[pre[h]], expected.scale[pre[h]], rtol=0.1)
    assert (scale > 0).all()


def test_more_of_the_keys_is_kept_in_their_own_space():
    """Keys that are compressible before RoPE: a rotated mean helps, pre-RoPE channels help more."""
    inv_freq = make_inv_freq(64)
    keys = make_keys(2, 2000, 64, inv_freq=inv_freq, position=5)
    bands = ((0, 16, 0, 0),) * 2
    post = coded_error(keys, PageLayout(64, bands, "post"), None)
    mean = coded_error(keys, PageLayout(64, bands, "hybrid"), inv_freq)
    smaller = ((0, 8, 0, 0),) * 2
    hybrid = coded_error(keys, PageLayout(64, smaller, "hybrid", pre_bands=smaller), inv_freq)
    pre = coded_error(keys, PageLayout(64, bands, "pre"), inv_freq)
    assert post > 1.1 * mean > 1.1 * hybrid > 1.1 * pre


@pytest.mark.libraries
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    layout, inv_freq = HYBRID["mixed"], make_inv_freq(64)
    keys = make_keys(2, 300, 64, inv_freq=inv_freq, position=5)
    exact = fit_keys(keys, layout, inv_freq, 5)
    rounded = fit_keys(keys.to(dtype), layout, inv_freq, 5)
    for got, want in ((rounded.scale, exact.scale), (rounded.mean, exact.mean)):
        assert rms(got - want) < 0.1 * rms(want)
    # The keys' mean is taken off before RoPE: what is left is little next to it. But rounding may
    # change which pairs are dropped.
    assert rms(rounded.post_mean - exact.post_mean) < 0.02 * rms(exact.mean)


@pytest.mark.parametrize("position", [0, 5, 8])
def test_thinned_keys_are_keys_of_neighbouring_positions(position):
    inv_freq = make_inv_freq(64)
    keys = make_keys(2, 1000, 64, inv_freq=inv_freq, position=position)
    for max_tokens, step in ((1000, 1), (999, 2), (500, 2), (250, 4), (249, 8)):
        some, scaled, at = thinned(keys, inv_freq, position, max_tokens)
        first = -position % step
        assert_same(some, keys[:, first::step])
        assert some.data_ptr() == keys[:, first:].data_ptr()
        assert at * step == position + first
        # Unrotated by their new positions and frequencies they are what they were.
        expected, _, _ = ops.fit_basis(keys[:, first::step].clone(), inv_freq * step, at)
        mean, _, _ = ops.fit_basis(some, scaled, at)
        assert_same(mean, expected)
        whole, _, _ = ops.fit_basis(keys, inv_freq, position)
        assert rms(mean - whole) < 0.1 * rms(whole)
    some, scaled, at = thinned(keys, None, position, 500)
    assert scaled is None and some.shape[1] == 500


@pytest.mark.parametrize("rope", ["pre", "post", "hybrid"])
def test_a_basis_of_a_sample_codes_as_well(monkeypatch, rope):
    """Every fourth of 4096 keys: the error of all grows by less than a twentieth."""
    inv_freq = None if rope == "post" else make_inv_freq(64)
    keys = make_keys(2, 4096, 64, inv_freq=inv_freq, position=5)
    layout = HYBRID["mixed"] if rope == "hybrid" else make_layout(64, [4, 2, 0, 0], 2, rope)
    whole = coded_error(keys, layout, inv_freq)
    monkeypatch.setattr(fitting, "BASIS_TOKENS", 1024)
    assert whole != coded_error(keys, layout, inv_freq) < 1.05 * whole


def test_pre_channels_that_must_span_all_keys_see_all(monkeypatch):
    monkeypatch.setattr(fitting, "BASIS_TOKENS", 100)
    layout, inv_freq = HYBRID["mixed"], make_inv_freq(64)
    keys = make_keys(2, 700, 64, inv_freq=inv_freq)
    keys[:, 601] *= 20  # an odd token: every second leaves it out
    own = PreChannels.of(layout, inv_freq)
    clipped = fitting.fit_bases(keys, own, inv_freq=inv_freq).pre.scale
    spanning = fitting.fit_bases(keys, own, inv_freq=inv_freq, clip=False).pre.scale
    assert (spanning > 3 * clipped).any()
