"""A cache of static capacity gives the numbers and bytes of one that grows, step by step."""

import pytest
import torch

from cache_support import Driver
from svdq import Settings, SVDqCache

COARSE = {"schedule": [4, 2, 1, 0], "min_fit_tokens": 64}
CASES = {
    "pre": {**COARSE},
    "post": {**COARSE, "rope": "post"},
    "hybrid": {**COARSE, "rope": "hybrid"},
    "rotated-mean": {**COARSE, "rope": "rotated-mean"},
    "gain": {"k_bits": 2, "min_fit_tokens": 64},
    "exact values": {**COARSE, "v_bits": "exact"},
    "3-bit values": {**COARSE, "v_bits": 3},
    "no sinks": {**COARSE, "sink_tokens": 0, "residual_length": 16},
    "no window": {**COARSE, "residual_length": 0},
}
CAPACITY = 640


def pair(batch: int = 2, **settings) -> tuple[Driver, Driver]:
    """Drivers of the same keys: of a cache that grows, and of one with static capacity."""
    return Driver(batch, **settings), Driver(batch, **settings, max_cache_len=CAPACITY)


def step(drivers: tuple[Driver, Driver], length: int, off: float = 0, **kwargs) -> None:
    """The same new tokens into both; outputs that are equal, or off by rounding alone."""
    new = drivers[0].draw(length)
    grown, static = (driver.attend(*new, **kwargs) for driver in drivers)
    torch.testing.assert_close(static, grown, rtol=0, atol=off)


def assert_same_pages(drivers: tuple[Driver, Driver]) -> None:
    for driver in drivers:
        driver.cache.memory_report()  # reads the lengths back
    drivers[1].layer.stop()
    grown, static = (driver.layer.tokens for driver in drivers)
    assert static.packed.slots == grown.packed.slots
    assert static.window.count == grown.window.count
    for b, pages in enumerate(grown.packed.pool.pages):
        own = static.packed.pool.pages[b]
        assert torch.equal(static.packed.pool.k_pages[own], grown.packed.pool.k_pages[pages])
        assert torch.equal(static.packed.pool.v_pages[own], grown.packed.pool.v_pages[pages])
        count = grown.window.count[b]
        assert torch.equal(static.window.keys[b, :, :count], grown.window.keys[b, :, :count])
        assert torch.equal(static.window.values[b, :, :count], grown.window.values[b, :, :count])
    drivers[1].layer.settle()


def padded(batch: int, length: int) -> torch.Tensor:
    """A mask of left padding: 0, 37, 74 ... tokens."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        mask[b, : 37 * b] = False
    return mask


@pytest.mark.libraries
@pytest.mark.parametrize("length", [1, 3, 64])
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_a_growing_cache(backend, name, length):
    # The kernels split a sequence by its capacity, so their sums have another order.
    off = 1e-6 if backend == "emulated" else 0
    drivers, steps = pair(**CASES[name]), 5 if length == 64 else 150 // length
    step(drivers, 250, attention_mask=padded(2, 250))
    assert drivers[1].layer.is_static
    for _ in range(2 if backend == "emulated" else steps):
        step(drivers, length, off)
    assert drivers[1].layer.is_static
    assert_same_pages(drivers)


def test_rules_of_logits_are_those_of_a_growing_cache():
    drivers = pair(**CASES["hybrid"])
    rules = {"softcap": 5.0, "s_aux": torch.tensor([0.5, 1.0, -1.0, 2.0]), "sliding_window": 150}
    step(drivers, 250, attention_mask=padded(2, 250), **rules)
    for _ in range(30):
        step(drivers, 5, **rules)
    assert_same_pages(drivers)


def test_host_driven_changes_stop_and_start_again():
    drivers = pair(**CASES["pre"])
    step(drivers, 250)
    for change in (
        lambda cache: cache.crop(-40),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 3])),
    ):
        for driver in drivers:
            change(driver.cache)
            driver.batch = driver.layer.batch_size
        assert drivers[1].layer.is_static
        for _ in range(3):
            step(drivers, 30)
        assert_same_pages(drivers)
        assert drivers[1].cache.memory_report().total_bytes == drivers[1].cache.allocated_bytes()
    step(drivers, 70)  # more tokens than a step takes
    step(drivers, 1)
    assert_same_pages(drivers)


def test_a_saved_cache_goes_on(tmp_path):
    drivers = pair(**CASES["hybrid"])
    step(drivers, 250)
    step(drivers, 5)
    drivers[1].cache.save(tmp_path / "cache")
    drivers[1].cache = SVDqCache.load(tmp_path / "cache", drivers[1].config)
    assert drivers[1].layer.is_static
    step(drivers, 60)
    assert_same_pages(drivers)


def test_short_prompts_become_static_later():
    drivers = pair(**COARSE)
    step(drivers, 60)
    assert not drivers[1].cache.is_compileable
    for _ in range(4):
        step(drivers, 40)
    assert drivers[1].cache.is_compileable
    assert isinstance(drivers[1].cache.get_seq_length(), torch.Tensor)
    assert drivers[1].cache.layers[0].get_mask_sizes(1) == (CAPACITY, 0)


def test_a_full_cache_and_bad_numbers_leave_it_as_it_was():
    drivers = pair(1, **COARSE)
    step(drivers, 250)
    query, keys, values = drivers[0].draw(1)
    for bad in (torch.full_like(keys, torch.nan), torch.full_like(keys, torch.inf)):
        with pytest.raises(ValueError, match="must be finite"):
            drivers[1].attend(query, bad, values)
        with pytest.raises(ValueError, match="must be finite"):
            drivers[1].attend(query, keys, bad)
    step(drivers, 1)
    assert_same_pages(drivers)
    with pytest.raises(ValueError, match="capacity"):
        for _ in range(20):
            drivers[1].feed(64)
    with pytest.raises(ValueError, match="max_cache_len"):
        Driver(1, **COARSE, max_cache_len=100).feed(101)


@pytest.mark.parametrize(
    "more", [{"outlier_fraction": 0.1}, {"refit_drift": 2.0}, {"sparse_budget": 64}]
)
def test_what_a_static_cache_does_not_do(more):
    with pytest.raises(ValueError, match=f"max_cache_len does not go together with {[*more][0]}"):
        Settings(max_cache_len=128, **COARSE, **more)
