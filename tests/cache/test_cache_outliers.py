"""Tokens whose keys are held exact beside their codes."""

import pytest
import torch

from cache_support import Driver, assert_same_state, decoded, plain_attention, snapshot
from svdq import SVDqCache
from svdq.layout import NO_SLOT
from svdq.store.outliers import Outliers

SETTINGS = {"schedule": [4, 4, 2, 0, 0, 0, 0, 0], "residual_length": 0}
COARSE_TOLERANCE = 1e-2  # see test_cache.py


def with_loud(driver, length, loud):
    """Tokens of the driver, ``loud`` ones all over the space: too few to bend the basis."""
    query, keys, values = driver.draw(length)
    keys = keys.clone()
    keys[:, :, loud] += 2 * torch.randn(*keys.shape[:2], len(loud), keys.shape[3])
    return query, keys, values


def chosen(driver, b=0):
    slots = driver.layer.tokens.packed.outliers.slots[b]
    return [[slot for slot in head if slot < NO_SLOT] for head in slots.tolist()]


@pytest.mark.parametrize("rope", ["pre", "post", "hybrid"])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_worst_coded_tokens_are_exact(rope, weighted):
    driver = Driver(2, outlier_fraction=0.01, rope=rope, query_weighted=weighted, **SETTINGS)
    loud = [70, 200, 311]
    query, keys, values = with_loud(driver, 640, loud)
    driver.attend(query, keys, values)
    for b in range(2):
        for head in chosen(driver, b):
            assert len(head) == 6 and head == sorted(head) and set(loud) <= set(head)
    tokens = driver.layer.tokens
    held = tokens.packed.outliers.keys[0, 0, [chosen(driver)[0].index(s) for s in loud]].float()
    if weighted:
        held = held / tokens.fit.gain[0, 0].float()
    # Rounded to bfloat16.
    torch.testing.assert_close(held, keys[0, 0, loud], rtol=2**-8, atol=0)


@pytest.mark.parametrize("rope", ["pre", "post", "hybrid", "rotated-mean"])
def test_attention_sees_exact_outliers(rope):
    driver = Driver(1, outlier_fraction=0.01, rope=rope, v_bits="exact", **SETTINGS)
    query, keys, values = with_loud(driver, 640, [70, 200])
    driver.attend(query, keys, values)
    old_keys, old_values = decoded(driver.layer)
    for h, head in enumerate(chosen(driver)):
        old_keys[h, head] = keys[0, h, head]
    query, new_keys, new_values = driver.draw(1)
    query = query + keys[:, :, 70:71].repeat_interleave(2, 1)  # looks at one of them
    out = driver.attend(query, new_keys, new_values, position_ids=torch.tensor([[640]]))
    expected = plain_attention(
        query[0], torch.cat([old_keys, new_keys[0]], 1), torch.cat([old_values, new_values[0]], 1)
    )
    assert (out[0].double() - expected).abs().max() <= COARSE_TOLERANCE * expected.abs().max()


def test_later_tokens_are_measured_by_the_prompt_s():
    driver = Driver(1, outlier_fraction=0.01, rope="post", **SETTINGS)
    driver.feed(640)
    before = chosen(driver)
    query, keys, values = with_loud(driver, 64, [7])
    driver.attend(query, keys, values)
    driver.feed(64)
    for old, new in zip(before, chosen(driver), strict=True):
        assert new[: len(old)] == old and 640 + 7 in new
        # 128 more tokens, of which the fit would have taken 1 %; bases lose a little on new keys.
        assert len(new) <= len(old) + 30


def test_changes_reach_outliers(tmp_path):
    driver = Driver(2, outlier_fraction=0.02, rope="post", **SETTINGS)
    driver.attend(*with_loud(driver, 640, [70, 500]))
    cache = driver.cache
    assert cache.memory_report().outlier_keys > 0
    assert cache.memory_report().total_bytes == cache.allocated_bytes()
    cache.save(tmp_path / "cache")
    loaded = SVDqCache.load(tmp_path / "cache", driver.config)
    assert_same_state(snapshot(loaded), snapshot(cache))
    mine, theirs = (c.layers[0].tokens.packed.outliers for c in (cache, loaded))
    for name in ("slots", "keys", "min_error"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))
    first, second = chosen(driver, 0), chosen(driver, 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert (chosen(driver, 0), chosen(driver, 1)) == (second, first)
    cache.crop(-300)
    assert all(slot < 340 for b in range(2) for head in chosen(driver, b) for slot in head)
    assert any(70 in head for head in chosen(driver, 0))


def test_choice_by_error_alone():
    outliers = Outliers(1, 2, 16, torch.float32, torch.device("cpu"))
    errors = torch.arange(40.0).repeat(2, 1)
    errors[1] = errors[1].flip(0)
    keys = torch.randn(2, 40, 16)
    outliers.choose(0, keys, errors, 0, fraction=0.1, skip=2)
    assert [x[:4] for x in outliers.slots[0].tolist()] == [[36, 37, 38, 39], [2, 3, 4, 5]]
    assert outliers.min_error[0].tolist() == [36, 34]
    outliers.choose(0, keys, errors, 40, fraction=None)
    assert sorted(x for x in outliers.slots[0, 0].tolist() if x < NO_SLOT)[4:] == [76, 77, 78, 79]
    assert [x for x in outliers.slots[0, 1].tolist() if x < NO_SLOT] == [2, 3, 4, 5, *range(40, 46)]


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 2])
def test_fractions_that_make_no_sense(fraction):
    with pytest.raises(ValueError, match="outlier_fraction must be at least 0 and below 0.5"):
        Driver(1, outlier_fraction=fraction)
