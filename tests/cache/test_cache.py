"""The tokens of an SVDqCache are in the window or packed, and it attends over just those."""

import pytest
import torch

from cache_support import FINE, Driver, decoded, plain_attention
from support import rms

# Losing or doubling one of n tokens changes an output by about 1 / sqrt(n) of its size, 3 % at the
# lengths below. The kernels round queries and probabilities to integers, which test_attend.py
# bounds; with 8-bit keys and exact values that is below 1e-4 here. With packed values probabilities
# have 8 bits: at most a fifth of what coding does to an output, which is a tenth of its size.
FINE_TOLERANCE, COARSE_TOLERANCE = 1e-3, 2e-2
# Two quantizations of the same keys at 8 bits a channel, ranges of some 8 deviations: each leaves
# 8 / 255 / sqrt(12) < 1 % of a deviation, and clipped tails about as much. Other tokens' keys would
# differ by more than their size.
SAME_TOKENS = 0.05
# Keys that drift away from those a basis was fitted on are clipped; other tokens' differ by 1.
OTHER_TOKENS = 0.3
CHUNKS = (300, 1, 1, 20, 64, 200, 1, 63, 65, 64, 1)
# PyTorch's own attention in float32: sums over tokens take as many roundings of 2^-24,
# which add up like a random walk. These are six deviations.
EXACT_TOLERANCE = 6 * sum(CHUNKS) ** 0.5 * 2.0**-24


def feed_and_compare(driver, length, tolerance, padding=None, **kwargs):
    """Feed new tokens; what comes out must be plain attention over the cached and the new."""
    layer, padding = driver.layer, padding or [0] * driver.batch
    past = [decoded(layer, b) if layer.seq_length else None for b in range(driver.batch)]
    query, keys, values = driver.draw(length)
    out = driver.attend(query, keys, values, **kwargs)
    for b, pad in enumerate(padding):
        own = [x[b, :, pad:].float() for x in (keys, values)]
        if past[b] is not None:
            own = [torch.cat([old, new], 1) for old, new in zip(past[b], own, strict=True)]
        expected = plain_attention(query[b, :, pad:], *own)
        error = (out[b, pad:].double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance
        assert not out[b, :pad].any()
        held = decoded(layer, b)
        assert held[1].shape == own[1].shape
        if driver.cache.settings.v_bits == "exact":
            assert torch.equal(held[1], own[1])
            assert rms(held[0] - own[0]) <= OTHER_TOKENS * rms(own[0])


@pytest.mark.parametrize("rope", ["pre", "post", "hybrid", "rotated-mean"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (FINE, FINE_TOLERANCE),
        ({"preset": "exact"}, EXACT_TOLERANCE),
        ({"preset": "paper-1.25"}, COARSE_TOLERANCE),
        ({"preset": "paper-2.25", "v_bits": 2}, COARSE_TOLERANCE),
    ],
    ids=["fine", "exact", "paper-1.25", "v2"],
)
def test_attends_over_what_it_holds(settings, tolerance, rope):
    driver = Driver(2, rope=rope, **settings)
    for length in CHUNKS:
        feed_and_compare(driver, length, tolerance)
    assert driver.cache.get_seq_length() == sum(CHUNKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attends_in_half_precision(dtype):
    driver = Driver(1, dtype, **FINE)
    for length in CHUNKS:
        feed_and_compare(driver, length, COARSE_TOLERANCE)


@pytest.mark.parametrize("sinks", [0, 1, 8, 64])
@pytest.mark.parametrize("residual", [0, 1, 64, 100])
def test_window_slides(sinks, residual):
    driver = Driver(sink_tokens=sinks, residual_length=residual, min_fit_tokens=1, **FINE)
    total = 0
    for length in (90, 1, 63, 64, 1, 1, 70, 128, 2):
        feed_and_compare(driver, length, FINE_TOLERANCE)
        total += length
        slots, kept = driver.layer.tokens.packed.slots[0], driver.layer.tokens.window.count[0]
        if total < sinks + residual + 64:
            assert slots == 0
        else:
            assert residual <= total - slots < residual + 64
        assert slots % 64 == 0
        assert kept == total - max(slots - sinks, 0)
    assert slots > 0


def test_nothing_is_packed_before_a_basis_can_be_fitted():
    driver = Driver(min_fit_tokens=500, **FINE)
    driver.feed(499)
    assert driver.layer.tokens.packed.slots == [0]
    driver.feed(1)
    assert driver.layer.tokens.packed.slots == [384]
    assert Driver(**FINE).feed(255).shape and Driver().config.head_dim * 4 == 256


def test_default_needs_four_tokens_a_channel():
    driver = Driver(preset="paper-1.25")
    driver.feed(255)
    assert driver.layer.tokens.packed.slots == [0]
    driver.feed(1)
    assert driver.layer.tokens.packed.slots == [192]


def test_whole_pages_are_packed_without_a_window():
    driver = Driver(residual_length=0, **FINE)
    driver.feed(3 * 1024)
    assert driver.layer.tokens.packed.slots == [3 * 1024]
    assert driver.layer.tokens.window.count == [8]
    feed_and_compare(driver, 1024, FINE_TOLERANCE)
    assert driver.layer.tokens.packed.slots == [4 * 1024]


def test_values_can_be_exact_while_keys_are_coarse():
    driver = Driver(v_bits="exact")
    query, keys, values = driver.draw(400)
    driver.attend(query, keys, values)
    held = decoded(driver.layer)
    assert torch.equal(held[1], values[0])
    assert not torch.equal(held[0], keys[0])


def test_sinks_and_window_are_exact():
    driver = Driver(sink_tokens=5)
    query, keys, values = driver.draw(500)
    driver.attend(query, keys, values)
    slots = driver.layer.tokens.packed.slots[0]
    for held, given in zip(decoded(driver.layer), (keys[0], values[0]), strict=True):
        assert torch.equal(held[:, :5], given[:, :5])
        assert torch.equal(held[:, slots:], given[:, slots:])
        assert not torch.equal(held[:, 5:slots], given[:, 5:slots])


def test_sinks_do_not_bend_the_basis():
    plain, outliers = (Driver(preset="paper-1.25") for _ in range(2))
    query, keys, values = plain.draw(400)
    plain.attend(query, keys, values)
    loud = keys.clone()
    loud[:, :, :8] *= 100
    outliers.attend(query, loud, values)
    for a, b in zip(decoded(plain.layer), decoded(outliers.layer), strict=True):
        assert torch.equal(a[:, 8:], b[:, 8:])


def test_ways_to_the_same_length_hold_the_same_tokens():
    """A prompt fed at once or in pieces: the same tokens are packed and exact."""
    whole, pieces = Driver(rope="post", **FINE), Driver(rope="post", **FINE)
    query, keys, values = whole.draw(600)
    whole.attend(query, keys, values)
    for start, stop in ((0, 300), (300, 301), (301, 500), (500, 564), (564, 600)):
        pieces.attend(*(x[:, :, start:stop] for x in (query, keys, values)))
    for store in (whole.layer.tokens, pieces.layer.tokens):
        assert store.packed.slots == [512] and store.window.count == [96]
    # Bases differ, fitted on 600 and on 300 tokens, and each key is quantized with both.
    for a, b in zip(decoded(whole.layer), decoded(pieces.layer), strict=True):
        assert rms(a - b) <= SAME_TOKENS * rms(a)


def test_left_padding_is_not_stored():
    driver, padding = Driver(3, **FINE), [0, 130, 299]
    mask = torch.arange(300) >= torch.tensor(padding)[:, None]
    feed_and_compare(driver, 300, FINE_TOLERANCE, padding, attention_mask=mask)
    tokens = driver.layer.tokens
    assert [tokens.count(b) for b in range(3)] == [300, 170, 1]
    assert tokens.packed.slots == [192, 0, 0]
    for length in (1, 100, 1, 64, 90, 200, 1):
        mask = torch.cat([mask, mask.new_ones(3, length)], 1)
        feed_and_compare(driver, length, FINE_TOLERANCE, attention_mask=mask)
    assert driver.cache.get_seq_length() == 757
    assert tokens.packed.slots == [640, 512, 384]


def test_positions_shift_the_rotation_alone():
    """Keys rotated by positions from 1000 on are packed as well as those from 0 on."""
    near, far = Driver(**FINE), Driver(**FINE)
    query, keys, values = near.draw(400)
    near.attend(query, keys, values, position_ids=torch.arange(400)[None])
    far.attend(query, keys, values, position_ids=torch.arange(1000, 1400)[None])
    assert far.layer.tokens.packed.first_position.tolist() == [1000]
    for a, b in zip(decoded(near.layer), decoded(far.layer), strict=True):
        assert rms(a - b) <= SAME_TOKENS * rms(a)
    out = far.feed(1, position_ids=torch.tensor([[1400]]))
    assert out.isfinite().all()


def test_full_keys_and_values_are_freed():
    """A cache keeps of a prompt the bytes that its report says, not the tensors of the model."""
    driver = Driver(dtype=torch.bfloat16)
    driver.feed(4096)
    full = 2 * 4096 * 2 * 64 * 2
    assert driver.cache.allocated_bytes() < full / 4
    driver = Driver(dtype=torch.bfloat16)
    for _ in range(8):
        driver.feed(512)
    assert driver.cache.allocated_bytes() < full / 4


def test_a_long_chunk_passes_through_a_small_window():
    """Packed sequences take a chunk page by page, so the window never grows to its length."""
    driver, seen = Driver(), []
    driver.feed(300)
    window = driver.layer.tokens.window
    resize = window.resize
    window.resize = lambda count: seen.append(count) or resize(count)
    driver.feed(2048)
    assert max(seen, default=0) <= 8 + 2 * 64 + 64
    assert driver.layer.tokens.packed.slots == [2240]


def test_unlimited_generation_keeps_its_memory_in_step():
    driver = Driver(dtype=torch.bfloat16)
    driver.feed(256)
    sizes = [driver.cache.allocated_bytes() for _ in range(260) if driver.feed(1) is not None]
    packed = driver.layer.tokens.packed
    assert packed.slots == [448]
    # Never more than the pages in use, an eighth and a page of slack, and the window.
    page = packed.layout.k_page_bytes + packed.layout.v_page_bytes
    window = driver.layer.tokens.window.keys.nbytes * 2
    assert max(sizes) <= (packed.slots[0] // 64 * 9 // 8 + 1) * page + window + 40_000
