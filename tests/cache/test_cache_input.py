"""Bad input gets one clear exception and leaves the cache as it was; so do bad settings."""

import pytest
import torch
from transformers import MistralConfig

from cache_support import CONFIGS, FINE, Driver, assert_same_state, snapshot
from svdq import SVDqCache, ops
from svdq.config.presets import PRESETS, preset_bits, resolve_keys
from svdq.hf.attention import svdq_attention


def filled():
    driver = Driver(2, **FINE)
    driver.feed(400, position_ids=torch.arange(400)[None])
    return driver


@pytest.fixture(params=["empty", "packed"])
def driver(request):
    """A cache that must be the same after the test as before it, and go on working."""
    driver = Driver(2, **FINE) if request.param == "empty" else filled()
    before = snapshot(driver.cache)
    yield driver
    assert_same_state(snapshot(driver.cache), before)
    assert driver.feed(300).isfinite().all()


def spoil(tensor, value):
    tensor = tensor.clone()
    tensor[1, 1, -1, 3] = value
    return tensor


@pytest.mark.parametrize("length", [1, 64, 100])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_not_finite(driver, which, value, length):
    query, keys, values = driver.draw(length)
    states = {"keys": keys, "values": values}
    states[which] = spoil(states[which], value)
    with pytest.raises((ValueError, RuntimeError), match=which.rstrip("s")):
        driver.attend(query, **states)


def test_shapes_that_differ(driver):
    query, keys, values = driver.draw(3)
    with pytest.raises(ValueError, match=r"of one shape.*\(2, 2, 3, 64\) and \(2, 2, 2, 64\)"):
        driver.attend(query, keys, values[:, :, 1:])
    with pytest.raises(ValueError, match=r"\[B, H, L, D\]"):
        driver.attend(query, keys[0], values[0])
    with pytest.raises(ValueError, match="not empty"):
        driver.attend(query, keys[:, :, :0], values[:, :, :0])


def test_dtypes_that_differ(driver):
    query, keys, values = driver.draw(3)
    with pytest.raises(ValueError, match=r"float32 and torch\.float16"):
        driver.attend(query, keys, values.half())
    with pytest.raises(ValueError, match=r"query must be torch\.float32.*got torch\.float16"):
        driver.attend(query.half(), keys, values)


def test_dtype_that_no_model_has(driver):
    query, keys, values = (x.to(torch.float64) for x in driver.draw(3))
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        driver.attend(query, keys, values)


@pytest.mark.parametrize("shape", [(2, 3, 3, 64), (2, 4, 2, 64), (2, 4, 3, 32), (1, 4, 3, 64)])
def test_query_that_does_not_fit(driver, shape):
    _, keys, values = driver.draw(3)
    with pytest.raises(ValueError, match=r"query must be .*\[2, n \* 2, 3, 64\]"):
        driver.attend(torch.randn(shape), keys, values)


@pytest.mark.parametrize("shape", [(1, 2, 3, 64), (2, 1, 3, 64), (2, 2, 3, 32)])
def test_tokens_of_another_model_or_batch(shape):
    driver = filled()
    before = snapshot(driver.cache)
    with pytest.raises(ValueError, match="batch changes through reorder_cache"):
        driver.cache.update(torch.randn(shape), torch.randn(shape), 0)
    assert_same_state(snapshot(driver.cache), before)


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 0, 1, 1], [1, 1, 1, 1]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
        [[0, 1, 0, 1], [1, 1, 1, 1]],
    ],
    ids=["hole", "right padding", "hole after padding"],
)
def test_mask_that_is_no_left_padding(rows):
    driver = Driver(2, **FINE)
    with pytest.raises(ValueError, match="must be left padding"):
        driver.feed(4, attention_mask=torch.tensor(rows, dtype=torch.bool))
    assert driver.cache.get_seq_length() == 0


def test_mask_of_another_length(driver):
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[B, \d+\], cached tokens included"
    ):
        driver.feed(2, attention_mask=torch.ones(2, 1, dtype=torch.bool))


def test_padding_that_changes():
    driver = filled()
    before = snapshot(driver.cache)
    mask = torch.arange(401) >= torch.tensor([[0], [7]])
    with pytest.raises(ValueError, match=r"padding must stay .*\[0, 0\], got \[0, 7\]"):
        driver.feed(1, attention_mask=mask)
    assert_same_state(snapshot(driver.cache), before)


@pytest.mark.parametrize("positions", [[[5, 6, 8]], [[3, 2, 1]], [[1, 1, 1]]])
def test_positions_with_gaps(positions):
    driver = Driver(2, **FINE)
    with pytest.raises(ValueError, match="must be at position"):
        driver.feed(3, position_ids=torch.tensor(positions))
    assert driver.cache.get_seq_length() == 0
    assert Driver(2, rope="post").feed(3, position_ids=torch.tensor(positions)).isfinite().all()


@pytest.mark.parametrize("length", [1, 3, 100])
def test_positions_that_do_not_go_on(length):
    driver = filled()
    before = snapshot(driver.cache)
    with pytest.raises(ValueError, match="token 0 of sequence 0 must be at position 400, got 401"):
        driver.feed(length, position_ids=torch.arange(401, 401 + length)[None])
    assert_same_state(snapshot(driver.cache), before)


def test_positions_of_another_shape():
    with pytest.raises(ValueError, match=r"position_ids must be \[2 or 1, L\], got \(3, 2, 4\)"):
        Driver(2, **FINE).feed(4, position_ids=torch.zeros(3, 2, 4, dtype=torch.long))


def test_tokens_that_nobody_attended():
    driver = Driver(**FINE)
    _, keys, values = driver.draw(3)
    driver.cache.update(keys, values, 0)
    with pytest.raises(RuntimeError, match="stopped there; it has been taken back"):
        driver.cache.update(keys, values, 0)
    assert driver.cache.get_seq_length() == 0
    driver.layer.update(keys, values)
    with pytest.raises(RuntimeError, match="3 tokens given to update"):
        driver.layer.update(keys, values)


@pytest.mark.parametrize(("length", "name"), [(300, "pack_keys_"), (1, "attend"), (100, "merge")])
def test_operators_that_fail(monkeypatch, length, name):
    """After any failure before new tokens are stored, the cache is as it was."""
    driver = filled() if length < 300 else Driver(2, **FINE)
    before = snapshot(driver.cache)

    def fail(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(ops, name, fail)
        driver.feed(length)
    assert_same_state(snapshot(driver.cache), before)
    assert driver.feed(300).isfinite().all()


def test_tokens_that_are_used_twice():
    driver = Driver(**FINE)
    query, keys, values = driver.draw(3)
    new, _ = driver.cache.update(keys, values, 0)
    driver.layer.attend(query, new)
    driver.layer.pending = 0
    with pytest.raises(RuntimeError, match="used once"):
        svdq_attention(driver.module, query, new, new, None)
    assert driver.cache.get_seq_length() == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "paper-9"}, "preset must be one of"),
        (
            {"preset": "paper-1.25", "schedule": [4]},
            "give one of preset, schedule, k_bits, kv_bits and lambda_",
        ),
        ({"preset": "paper-1.25", "k_bits": 16}, "give one of"),
        ({"k_bits": 9}, "k_bits must be above 0 and at most 8, or 16, got 9"),
        ({"k_bits": 0}, "k_bits must be above 0"),
        ({"k_bits": 1, "lambda_": 1}, "give one of"),
        ({"lambda_": 0}, "lambda_ must be above 0"),
        ({"k_bits": 1, "allocate_across": "token"}, "allocate_across must be one of"),
        ({"lambda_": 1, "allocate_across": "head"}, "one price for the model"),
        ({"k_bits": 16, "query_weighted": True}, "query_weighted needs keys that are packed"),
        ({"schedule": []}, "schedule must be widths"),
        ({"schedule": [0, 0]}, "schedule must be widths"),
        ({"schedule": [2, 4]}, "schedule must be widths"),
        ({"schedule": [8, 3]}, "schedule must be widths"),
        ({"k_bits": 16, "v_bits": 4}, "exact keys come with exact values"),
        ({"preset": "exact", "v_bits": 2}, "exact keys come with exact values"),
        ({"v_bits": 5}, "v_bits must be one of"),
        ({"v_bits": "full"}, "v_bits must be one of"),
        ({"rope": "half"}, "rope must be one of"),
        ({"rope": "hybrid", "pre_channels": 4}, "pre_channels must be a positive multiple of 8"),
        ({"sink_tokens": -1}, r"sink_tokens must be 0 \.\. 64"),
        ({"sink_tokens": 65}, r"sink_tokens must be 0 \.\. 64"),
        ({"residual_length": -1}, "residual_length must be at least 0"),
        ({"min_fit_tokens": 0}, "min_fit_tokens must be at least 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        SVDqCache(CONFIGS["llama"], **settings)


@pytest.mark.parametrize(("v_bits", "dtype"), [(16, torch.float32), (32, torch.bfloat16)])
def test_value_bits_that_the_model_does_not_have(v_bits, dtype):
    driver = Driver(1, dtype, v_bits=v_bits)
    with pytest.raises(ValueError, match=f"v_bits must be 4, 3, 2, .* got {v_bits}"):
        driver.feed(3)
    assert driver.cache.get_seq_length() == 0


def test_groups_of_values_are_no_more():
    with pytest.warns(FutureWarning, match="v_group_size is ignored: values have one scale"):
        cache = SVDqCache(CONFIGS["llama"], v_group_size=32)
    assert cache.settings == SVDqCache(CONFIGS["llama"]).settings


def test_model_without_full_attention():
    sizes = CONFIGS["mistral"].to_dict() | {"sliding_window": 32}
    with pytest.raises(ValueError, match="no full-attention layer"):
        SVDqCache(MistralConfig(**sizes))


def test_schedules():
    assert resolve_keys("paper-1.25") == (PRESETS["paper-1.25"], None)
    with pytest.raises(ValueError, match="give one of preset, schedule, k_bits, kv_bits and"):
        resolve_keys()
    assert resolve_keys(kv_bits=2.5) == (None, None)
    assert resolve_keys(k_bits=2.25) == (None, 2.25)
    assert resolve_keys(k_bits=16) == resolve_keys(preset="exact") == (None, None)
    assert resolve_keys(lambda_=0.1) == (None, None)
    assert resolve_keys(schedule=[4, 0]) == ((4, 0), None)
    assert [preset_bits(name) for name in PRESETS] == [2.25, 2.0, 1.25, 16.0]
