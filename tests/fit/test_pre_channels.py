"""Fast RoPE pairs that the pre-RoPE channels of a hybrid layout drop."""

import pytest
import torch

from support import (
    ROUNDING,
    assert_orthogonal,
    assert_same,
    assert_within,
    make_inv_freq,
    make_keys,
    make_layout,
)
from svdq import _C, ops, reference
from svdq.fit import bases as fitting
from svdq.fit.pre_channels import (
    DROPPED_VARIANCE,
    PreChannels,
    dropped_pairs,
    without_pairs,
)
from svdq.layout import PAGE_TOKENS, PageLayout
from svdq.store.packed import PackedStore

pytestmark = pytest.mark.libraries

LAYOUT = make_layout(64, [2, 0, 0, 0], 2, "hybrid", pre_bands=((0, 8, 0, 0),) * 2)
RANKS = torch.tensor([8, 8])
INV_FREQ = make_inv_freq(64)
FAST = INV_FREQ > 1 / 64
SLOW = torch.full((32,), 1e-3)


def uneven_keys(weak_pairs, position=0, inv_freq=INV_FREQ, num_tokens=700):
    """Keys [2, T, 64] of which some pairs have a hundredth of the others' deviation."""
    keys = make_keys(2, num_tokens, 64)
    keys[..., [*weak_pairs, *(32 + i for i in weak_pairs)]] /= 100
    positions = position + torch.arange(num_tokens)
    return reference.rotate(keys, positions, inv_freq).float()


def test_fast_pairs_are_not_absorbed():
    """A page rotates an absorbed pair by half a radian at most, either way from its middle."""
    assert _C.ABSORBED_FASTEST * PAGE_TOKENS / 2 == 0.5
    assert PreChannels.of(LAYOUT, INV_FREQ).fast.tolist() == FAST.tolist()
    assert 0 < FAST.sum() < 32
    assert PreChannels.of(make_layout(64, [4], 2, "pre"), INV_FREQ) is None
    with pytest.raises(ValueError, match=r"inv_freq.*None"):
        PreChannels.of(LAYOUT, None)


def test_the_fast_pairs_that_hold_least_are_dropped():
    """With components that are channels it is plain what pairs hold."""
    components = torch.eye(64).expand(2, 64, 64)
    held = torch.tensor([[50, 2, 2, 46, 0], [1, 1, 50, 2, 46]])  # pairs 0 .. 4, 100 together
    variance = torch.full((2, 64), 1e-3)
    variance[:, :5], variance[:, 32:37] = 0.25 * held, 0.75 * held
    fast = torch.arange(32) < 4
    dropped = dropped_pairs(components, variance, torch.tensor([10, 10]), fast)
    assert DROPPED_VARIANCE == 0.05
    assert dropped.sum(1).tolist() == [2, 3]
    assert dropped[0, 1:3].all() and dropped[1, [0, 1, 3]].all()
    # Queries that do not look at the large pairs make the others matter.
    energy = torch.ones(2, 64)
    energy[:, [0, 32, 2, 34]] = 1e-6
    dropped = dropped_pairs(components, variance, torch.tensor([10, 10]), fast, energy)
    assert [x.nonzero()[:, 0].tolist() for x in dropped] == [[0, 2], [0, 2]]
    # Components past the pre-RoPE channels do not count: of the first two, one is of a slow pair.
    variance[:, 36], variance[:, 4] = 1000, 0
    dropped = dropped_pairs(components, variance, torch.tensor([1, 1]), fast)
    assert dropped[:, :4].all() and not dropped[:, 4:].any()


@pytest.mark.parametrize("num_tokens", [20, 700])
def test_components_without_pairs(num_tokens):
    """Exact zeros, right angles, and all that is left of the covariance."""
    keys = make_keys(2, num_tokens, 64)
    _, components, variance = ops.fit_basis(keys)
    dropped = torch.zeros(2, 32, dtype=torch.bool)
    dropped[0, [0, 5, 6]] = True  # none of the other head
    left = torch.cat([dropped, dropped], dim=1)
    found, spectrum = without_pairs(components, variance, dropped)
    assert (found[0, :58][:, left[0]] == 0).all()
    assert (found[0, 58:][:, ~left[0]] == 0).all()
    assert_within(found @ found.mT, torch.eye(64).expand(2, 64, 64), 1e-5)
    assert (spectrum >= 0).all() and (spectrum.diff(dim=1) <= 0).all()
    assert (spectrum[0, 58:] == 0).all()
    covariance = components.mT @ (variance[..., None] * components)
    covariance[left[:, None] | left[..., None]] = 0
    assert_within(found.mT @ (spectrum[..., None] * found), covariance, 1e-5 * variance.max())
    assert_within(spectrum[1], variance[1], 1e-5 * variance.max())
    assert (found.gather(2, found.abs().argmax(2, keepdim=True)) > 0).all()


def test_keys_that_are_all_alike():
    """No variance, so nothing matters: any basis will do, as long as it is one."""
    components, variance = PreChannels.of(LAYOUT, INV_FREQ).drop(
        torch.eye(64).repeat(2, 1, 1), torch.zeros(2, 64)
    )
    assert_within(components @ components.mT, torch.eye(64).expand(2, 64, 64), 1e-5)
    assert (variance == 0).all()
    assert (components[:, : int((~FAST).sum()) * 2, :32][..., FAST] == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_basis_vectors_are_zero_in_dropped_pairs(backend, weighted):
    weak = [0, 3, 4, 20]  # the last one is slow
    keys = uneven_keys(weak)
    energy = torch.ones(2, 64) if weighted else None
    fitted = fitting.fit_bases(
        keys, PreChannels.of(LAYOUT, INV_FREQ), inv_freq=INV_FREQ, energy=energy
    )
    rows = fitted.pre.basis.unflatten(0, (2, 8))
    zero = (rows[..., :32] == 0).all(1) & (rows[..., 32:] == 0).all(1)
    assert rows.dtype == torch.bfloat16
    assert zero[:, [0, 3, 4]].all()
    assert not zero[:, ~FAST].any()
    if weighted:
        assert zero.sum() == 6
    gram = rows.float() @ rows.float().mT
    assert_within(gram, torch.eye(8).expand(2, 8, 8), 8 * ROUNDING[torch.bfloat16])
    # The mean is whole: what it lacked would take two post-RoPE channels a pair.
    mean, _, _ = ops.fit_basis(keys, INV_FREQ)
    assert (fitted.pre.mean - mean).abs()[..., [0, 3, 4]].max() < 1e-5


def test_a_rope_without_fast_pairs_drops_none():
    keys = make_keys(2, 700, 64, inv_freq=SLOW)
    mean, components, _ = ops.fit_basis(keys, SLOW)
    expected = ops.fit_quantizer(keys, mean, components, LAYOUT.pre_part, inv_freq=SLOW)
    got = fitting.fit_bases(keys, PreChannels.of(LAYOUT, SLOW), inv_freq=SLOW).pre
    for name, want in expected.tensors().items():
        assert_same(getattr(got, name), want)


@pytest.mark.parametrize("theta", [1.0, 1e4], ids=["only-fast", "mixed"])
@pytest.mark.parametrize(
    "layout",
    [LAYOUT, PageLayout(64, ((0, 0, 16, 0),) * 2, "hybrid", pre_bands=((0, 32, 32, 0),) * 2)],
    ids=["few", "all"],
)
def test_any_rope_and_any_number_of_pre_channels(backend, theta, layout):
    inv_freq = make_inv_freq(64, theta)
    keys = uneven_keys([1, 2], inv_freq=inv_freq)
    codec = fitting.fit_keys(keys, layout, inv_freq)
    expected = reference.fit_keys(keys, layout, inv_freq)
    at, _ = reference.part_slices(layout)
    for h in range(2):
        assert_orthogonal(codec.basis[at[h]])
        if layout is LAYOUT:
            assert_same(codec.basis[at[h]] == 0, expected.basis[at[h]] == 0)
    assert all(x.isfinite().all() for x in codec.tensors().values())


def test_pairs_are_fast_by_the_positions_of_keys(monkeypatch):
    """Thinned keys have greater frequencies; slow pairs stay slow."""
    inv_freq = torch.full((32,), 0.9 * _C.ABSORBED_FASTEST)
    store = PackedStore(LAYOUT, 1, torch.float32, torch.device("cpu"))
    store.set_frequencies(inv_freq)
    keys = uneven_keys(range(30), inv_freq=inv_freq)
    monkeypatch.setattr(fitting, "BASIS_TOKENS", 100)
    store.fit(0, keys, 0, clip=True)
    pre_rows = store.codec.basis[0].unflatten(0, (2, -1))[:, :8]
    assert (pre_rows != 0).any(1).all()


def test_dropping_costs_little():
    """Decoded pre-RoPE channels lose at most what the dropped pairs hold."""
    keys = uneven_keys([0, 3, 4])
    mean, components, variance = ops.fit_basis(keys, INV_FREQ)
    dropped = dropped_pairs(components, variance, RANKS, FAST)
    found, _ = PreChannels.of(LAYOUT, INV_FREQ).drop(components, variance)
    assert dropped.any()
    covariance = components.mT @ (variance[..., None] * components)
    kept = torch.einsum("hjd,hde,hje->h", found[:, :8], covariance, found[:, :8])
    before = variance[:, :8].sum(1)
    assert ((1 - 2 * DROPPED_VARIANCE) * before <= kept).all() and (kept <= before).all()
