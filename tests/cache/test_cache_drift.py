"""Keys that are no longer what a basis was fitted on: measured, and given a basis of their own."""

import math

import pytest
import torch

from cache_support import Driver, assert_same_state, decoded, plain_attention, snapshot
from svdq import SVDqCache

COARSE_TOLERANCE = 2e-2  # derived in test_cache.py
SETTINGS = {"schedule": [4, 4, 2, 0, 0, 0, 0, 0], "rope": "post", "residual_length": 0}


def changed(driver, length, seed=5):
    """Tokens whose keys vary where those of the driver do not."""
    query, keys, values = driver.draw(length)
    return query, keys.flip(-1).contiguous(), values


def feed_changed(driver, length, step=64):
    for _ in range(0, length, step):
        driver.attend(*changed(driver, step))


def test_drift_is_one_while_keys_stay_alike():
    driver = Driver(2, **SETTINGS)
    assert driver.cache.drift() == [[]]
    driver.feed(100)
    assert all(math.isnan(x) for x in driver.cache.drift()[0])
    driver.feed(500)
    assert driver.cache.drift() == [[pytest.approx(1, abs=1e-6)] * 2]
    for _ in range(8):
        driver.feed(64)
    # The error of 16 tokens' 40 uncoded channels varies by some 10 %; a few pages' mean by less.
    assert driver.cache.drift() == [[pytest.approx(1, abs=0.3)] * 2]


def test_drift_shows_keys_that_changed():
    driver = Driver(1, **SETTINGS)
    driver.feed(600)
    feed_changed(driver, 640)
    assert driver.cache.drift()[0][0] > 3
    assert not driver.layer.tokens.past  # nothing is fitted anew unless asked for


@pytest.mark.parametrize("batch", [1, 2])
def test_a_new_basis_codes_what_changed(batch):
    errors = {}
    for bound in (None, 4.0):
        driver = Driver(batch, refit_drift=bound, **SETTINGS)
        driver.feed(600)
        feed_changed(driver, 1280)
        stores = driver.layer.tokens.stores
        errors[bound] = [float(stores[-1].drift.error.mean())]
        assert len(stores) == (1 if bound is None else 2)
        assert driver.cache.get_seq_length() == 1880
        assert [driver.layer.tokens.count(b) for b in range(batch)] == [1880] * batch
        report = driver.cache.memory_report()
        assert report.total_bytes == driver.cache.allocated_bytes()
    assert errors[4.0][0] < errors[None][0] / 3
    assert driver.cache.drift()[0][0] < 1.5


def test_positions_go_on_in_the_new_store():
    # Noise has no phase to un-rotate: before RoPE the two channels of a pair vary alike.
    driver = Driver(1, refit_drift=1.5, **{**SETTINGS, "rope": "pre"})
    driver.feed(600)
    feed_changed(driver, 1280)
    stores = driver.layer.tokens.stores
    assert len(stores) > 1
    position = 0
    for store in stores:
        assert store.position == [position] == store.first_position.tolist()
        position += store.slots[0]


@pytest.mark.parametrize("rope", ["pre", "post", "hybrid", "rotated-mean"])
def test_attention_reads_every_store(rope):
    driver = Driver(2, refit_drift=1.5, **{**SETTINGS, "rope": rope})
    driver.feed(600)
    feed_changed(driver, 1280)
    assert driver.layer.tokens.past
    for length in (1, 100):  # decoding, and a chunk that attends among itself
        before = [decoded(driver.layer, b) for b in range(2)]
        query, keys, values = driver.draw(length)
        positions = torch.arange(length)[None] + driver.cache.get_seq_length()
        out = driver.attend(query, keys, values, position_ids=positions)
        for b, (old_keys, old_values) in enumerate(before):
            all_keys = torch.cat([old_keys, keys[b]], 1)
            all_values = torch.cat([old_values, values[b]], 1)
            expected = plain_attention(query[b], all_keys, all_values)
            # As in test_cache.py; a store that is left out or read twice changes far more.
            error = (out[b].double() - expected).abs().max() / expected.abs().max()
            assert error <= COARSE_TOLERANCE


def test_changes_of_the_past_reach_every_store(tmp_path):
    driver = Driver(2, refit_drift=4.0, **SETTINGS)
    driver.feed(600)
    feed_changed(driver, 1280)
    assert len(driver.layer.tokens.past) == 1
    driver.cache.save(tmp_path / "cache")
    loaded = SVDqCache.load(tmp_path / "cache", driver.config)
    assert_same_state(snapshot(loaded), snapshot(driver.cache))
    assert loaded.drift() == driver.cache.drift()
    driver.cache.reorder_cache(torch.tensor([1, 0]))
    driver.cache.batch_select_indices(torch.tensor([0]))
    assert driver.cache.memory_report().total_bytes == driver.cache.allocated_bytes()
    driver.cache.crop(-1200)  # into the first store
    assert len(driver.layer.tokens.stores) == 1
    assert driver.layer.tokens.count(0) == 680
    driver.batch = 1
    driver.feed(300)
    driver.cache.crop(-975)  # sinks alone
    assert driver.layer.tokens.count(0) == 5
    driver.feed(700)
    assert driver.cache.get_seq_length() == 705


def test_bounds_that_make_no_sense():
    for bound in (1, 0.5, -1):
        with pytest.raises(ValueError, match="refit_drift must be above 1"):
            Driver(1, refit_drift=bound)
