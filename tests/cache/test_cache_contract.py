"""Changes of a cache by transformers between steps: crop, reorder, repeat, select, reset."""

import copy

import pytest
import torch
from test_cache import FINE_TOLERANCE, feed_and_compare
from transformers import Cache

from cache_support import FINE, Driver, assert_same_state, decoded, snapshot
from svdq.cache.cache import CROP_ZERO_REMOVES


def feed_and_check(driver, *lengths):
    for length in lengths:
        feed_and_compare(driver, length, FINE_TOLERANCE)


@pytest.mark.parametrize("removed", [1, 20, 84, 85, 100, 148, 300, 376, 391])
def test_crop_keeps_the_tokens_before(removed):
    """Into the window, whole pages back, inside a page; then the cache goes on from there."""
    driver = Driver(2, **FINE)
    driver.feed(400)  # 320 packed, a window of 80
    before = [decoded(driver.layer, b) for b in range(2)]
    driver.cache.crop(-removed)
    assert driver.cache.get_seq_length() == 400 - removed
    for b in range(2):
        for held, old in zip(decoded(driver.layer, b), before[b], strict=True):
            assert torch.equal(held, old[:, : 400 - removed])
    feed_and_check(driver, 1, 1, 50, 63, 65, 200, 1)


@pytest.mark.parametrize("length", [1, 5, 8])
def test_crop_to_the_sinks_forgets_the_basis(length):
    driver = Driver(**FINE)
    driver.feed(400)
    driver.cache.crop(length - 400)
    assert driver.layer.tokens.packed.slots == [0]
    assert driver.layer.tokens.packed.fitted == [False]
    feed_and_check(driver, 1, 100, 200, 1)
    assert driver.layer.tokens.packed.fitted == [True]


def test_crop_takes_a_length_to_keep():
    driver = Driver(**FINE)
    driver.feed(400)
    driver.cache.crop(350)
    assert driver.cache.get_seq_length() == 350
    driver.cache.crop(1000)
    assert driver.cache.get_seq_length() == 350


def test_crop_of_zero_follows_transformers():
    driver = Driver(**FINE)
    driver.feed(400)
    driver.cache.crop(0)
    assert driver.cache.get_seq_length() == (0 if CROP_ZERO_REMOVES else 400)


def test_crop_of_everything_empties_the_cache():
    driver = Driver(**FINE)
    driver.feed(400)
    driver.cache.crop(-400)
    assert driver.cache.get_seq_length() == 0
    feed_and_check(driver, 300, 1)


@pytest.mark.parametrize("removed", [400, 401, 5000])
def test_crop_of_all_there_is_and_more(removed):
    """As transformers' own layers, which are left empty."""
    driver = Driver(**FINE)
    driver.feed(400)
    driver.cache.crop(-removed)
    assert driver.cache.get_seq_length() == driver.cache.allocated_bytes() == 0
    feed_and_check(driver, 300, 1)


@pytest.mark.parametrize("name", ["length", "tokens_to_remove", "max_length"])
def test_crop_by_the_names_of_every_transformers(name):
    driver = Driver(**FINE)
    driver.feed(400)
    driver.cache.crop(**{name: -10})
    assert driver.cache.get_seq_length() == 390
    for wrong in ({}, {"length": 1, "max_length": 1}):
        with pytest.raises(TypeError, match="one length"):
            driver.cache.crop(**wrong)
    assert driver.cache.get_seq_length() == 390


def test_crop_gives_memory_back():
    driver = Driver(**FINE)
    driver.feed(4000)
    held = driver.cache.allocated_bytes()
    driver.cache.crop(-3000)
    assert driver.cache.allocated_bytes() < held / 2
    assert driver.cache.allocated_bytes() == driver.cache.memory_report().total_bytes


def test_crop_into_padding():
    driver = Driver(2, **FINE)
    driver.feed(300, attention_mask=torch.arange(300) >= torch.tensor([[0], [295]]))
    driver.cache.crop(-10)
    assert [driver.layer.tokens.count(b) for b in range(2)] == [290, 0]
    feed_and_check(driver, 1, 70)


def test_repeated_crop_and_append_stays_exact_to_the_codes():
    """As assisted generation does: a few tokens are tried, some are taken back."""
    driver = Driver(residual_length=0, **FINE)
    driver.feed(300)
    for tried, removed in ((7, 5), (40, 3), (64, 64), (100, 99), (1, 1), (30, 0), (90, 80)):
        feed_and_check(driver, tried)
        before = decoded(driver.layer)
        if removed:
            driver.cache.crop(-removed)
        for held, old in zip(decoded(driver.layer), before, strict=True):
            assert torch.equal(held, old[:, : held.shape[1]])


def test_reorder_moves_whole_sequences():
    driver = Driver(3, **FINE)
    driver.feed(400)
    before = [decoded(driver.layer, b) for b in range(3)]
    driver.cache.reorder_cache(torch.tensor([2, 0, 0]))
    for b, origin in enumerate([2, 0, 0]):
        for held, old in zip(decoded(driver.layer, b), before[origin], strict=True):
            assert torch.equal(held, old)
    feed_and_check(driver, 1, 63, 1, 65)


def test_copies_share_pages_until_they_differ():
    driver = Driver(1, **FINE)
    driver.feed(2048)
    pages = len(driver.layer.tokens.packed.pool.used_pages)
    driver.cache.batch_repeat_interleave(4)
    driver.batch = 4
    assert len(driver.layer.tokens.packed.pool.used_pages) == pages
    feed_and_check(driver, 1, 64)
    assert len(driver.layer.tokens.packed.pool.used_pages) == pages + 4


def test_copies_share_no_part_full_page():
    """After a crop into a page both copies go on filling it, each with its own tokens."""
    driver = Driver(1, **FINE)
    driver.feed(400)
    driver.cache.crop(-200)  # 200 tokens, 3 pages and 8 slots
    driver.cache.batch_repeat_interleave(2)
    driver.batch = 2
    assert driver.layer.tokens.packed.slots == [200, 200]
    feed_and_check(driver, 120, 1, 64)
    first, second = (decoded(driver.layer, b) for b in range(2))
    assert torch.equal(first[0][:, :200], second[0][:, :200])
    assert not torch.equal(first[0][:, 200:], second[0][:, 200:])


def test_batch_select_keeps_the_chosen():
    driver = Driver(4, **FINE)
    driver.feed(1024)
    before = [decoded(driver.layer, b) for b in range(4)]
    held = driver.cache.allocated_bytes()
    driver.cache.batch_select_indices(torch.tensor([3, 1]))
    driver.batch = 2
    for b, origin in enumerate([3, 1]):
        for now, old in zip(decoded(driver.layer, b), before[origin], strict=True):
            assert torch.equal(now, old)
    assert driver.cache.allocated_bytes() < 0.6 * held
    feed_and_check(driver, 1, 64)


@pytest.mark.parametrize(
    "chosen",
    [torch.tensor([False, False, True]), [2], [-1], slice(2, None), torch.tensor([2])],
    ids=["mask", "list", "negative", "slice", "tensor"],
)
def test_batch_select_takes_what_indexes_a_tensor(chosen):
    driver = Driver(3, **FINE)
    driver.feed(300)
    before = decoded(driver.layer, 2)
    driver.cache.batch_select_indices(chosen)
    assert driver.layer.batch_size == 1
    assert torch.equal(decoded(driver.layer)[0], before[0])


def test_padding_moves_with_its_sequence():
    driver = Driver(2, **FINE)
    mask = torch.arange(300) >= torch.tensor([[0], [100]])
    driver.feed(300, attention_mask=mask)
    driver.cache.reorder_cache(torch.tensor([1, 1]))
    mask = torch.cat([mask[[1, 1]], mask.new_ones(2, 1)], 1)
    feed_and_compare(driver, 1, FINE_TOLERANCE, attention_mask=mask)


def test_operations_on_an_empty_cache_do_nothing():
    cache = Driver(**FINE).cache
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.allocated_bytes() == cache.memory_report().total_bytes == 0


def test_reset_frees_and_starts_over():
    driver = Driver(2, **FINE)
    driver.feed(400)
    driver.cache.reset()
    assert driver.cache.get_seq_length() == 0
    assert not driver.cache.is_initialized
    driver.batch = 1  # another batch is another start
    feed_and_check(driver, 300, 1)


def test_a_copy_is_independent():
    """A prompt's cache is copied to answer it twice, as transformers' documentation does."""
    driver = Driver(**FINE)
    driver.feed(400)
    before = snapshot(driver.cache)
    other = Driver(**FINE)
    other.cache = copy.deepcopy(driver.cache)
    feed_and_check(other, 100, 1)
    assert_same_state(snapshot(driver.cache), before)
    feed_and_check(driver, 1)


def test_lengths_that_transformers_asks_for():
    driver = Driver(**FINE)
    cache, layer = driver.cache, driver.layer
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    query, keys, values = driver.draw(300)
    new, same = cache.update(keys, values, 0)
    assert new is same and cache.get_seq_length() == 300
    layer.attend(query, new)
    assert cache.get_seq_length() == 300 and cache.is_initialized
    assert layer.get_mask_sizes(5) == (305, 0)
    assert layer.get_mask_sizes(torch.arange(300, 302)) == (302, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
    assert cache.is_croppable and not cache.is_compileable and cache.is_sliding == [False]
    assert isinstance(cache, Cache) and len(cache) == 1
    before = snapshot(cache)
    layer.offload()
    layer.prefetch()
    assert_same_state(snapshot(cache), before)
