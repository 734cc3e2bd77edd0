"""Caches in files: what is read back stands for the same tokens and goes on like the original."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from cache_support import CONFIGS, FINE, assert_same_state, make_model, make_tokens, snapshot
from svdq import SVDqCache, cache_argument


def prefilled(family, tokens, settings):
    model = make_model(family)
    cache = SVDqCache(model.config, **settings)
    with torch.inference_mode():
        model(tokens, **cache_argument(cache))
    return model, cache


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        FINE,
        {"preset": "exact"},
        {"rope": "post", "v_bits": 2, "clip": False, "sink_tokens": 3},
        {"k_bits": 0.7},
        {"kv_bits": 2.5, "min_fit_tokens": 500},
        {"lambda_": 1e-3, "rope": "post"},
        {"rope": "hybrid", "k_bits": 1.25, "pre_channels": 8},
        {"rope": "rotated-mean"},
    ],
    ids=[
        "default",
        "fine",
        "exact",
        "post",
        "allocated",
        "waiting",
        "price",
        "hybrid",
        "rotated mean",
    ],
)
def test_goes_on_like_the_original(tmp_path, family, settings):
    model, cache = prefilled(family, make_tokens(2, 400), settings)
    if family != "gemma3":  # its sliding layers have lost what a crop would need
        cache.crop(-130)
    cache.save(tmp_path / "cache.safetensors")
    loaded = SVDqCache.load(tmp_path / "cache.safetensors", model.config)
    assert loaded.settings == cache.settings
    assert_same_state(snapshot(loaded), snapshot(cache))
    assert loaded.memory_report().total_bytes == loaded.allocated_bytes()
    with torch.inference_mode():
        for length in (1, 100, 1):
            new = make_tokens(2, length, seed=length)
            expected = model(new, **cache_argument(cache)).logits
            assert torch.equal(model(new, **cache_argument(loaded)).logits, expected)


def test_file_is_no_larger_than_the_cache(tmp_path):
    _, cache = prefilled("llama", make_tokens(1, 2000), {})
    cache.save(tmp_path / "cache")
    report = cache.memory_report()
    header = 8000
    assert (tmp_path / "cache").stat().st_size <= report.total_bytes - report.slack + header


def test_shared_pages_are_saved_once(tmp_path):
    _, cache = prefilled("llama", make_tokens(1, 1000), {})
    cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(3)
    cache.save(tmp_path / "three")
    loaded = SVDqCache.load(tmp_path / "three", CONFIGS["llama"])
    assert_same_state(snapshot(loaded), snapshot(cache))
    assert loaded.memory_report().key_codes == cache.memory_report().key_codes


def test_empty_cache(tmp_path):
    SVDqCache(CONFIGS["gemma3"], rope="post").save(tmp_path / "cache")
    loaded = SVDqCache.load(tmp_path / "cache", CONFIGS["gemma3"])
    assert loaded.get_seq_length() == 0 and loaded.settings.rope == "post"


def rewrite(path, **metadata):
    """The same file with other metadata."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | metadata
    save_file(tensors, path, metadata)


@pytest.fixture
def path(tmp_path):
    _, cache = prefilled("llama", make_tokens(1, 400), {"preset": "paper-1.25"})
    cache.save(tmp_path / "cache")
    return tmp_path / "cache"


def test_another_format_version(path):
    rewrite(path, version="2")
    with pytest.raises(ValueError, match="has format version 2, this svdq reads 3"):
        SVDqCache.load(path, CONFIGS["llama"])


def test_another_file(path):
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a saved SVDqCache"):
        SVDqCache.load(path, CONFIGS["llama"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "has layers .* the model has"),
        ({"num_key_value_heads": 4}, r"the model \(KV heads, head_dim\) \(4, 64\)"),
        ({"head_dim": 32}, r"the model \(KV heads, head_dim\) \(2, 32\)"),
        ({"rope_theta": 5e5}, "another rotary embedding"),
    ],
    ids=str,
)
def test_a_model_of_another_shape(path, change, message):
    from cache_support import GQA, SIZES

    theta = change.pop("rope_theta", None)
    config = LlamaConfig(**(SIZES | GQA | change))
    if theta is not None and hasattr(config, "rope_parameters"):
        config.rope_parameters["rope_theta"] = theta
    elif theta is not None:
        config.rope_theta = theta
    with pytest.raises(ValueError, match=message):
        SVDqCache.load(path, config)


def test_pages_of_another_layout(path):
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["layers"])
    layers[0]["stores"][0]["layout"][14] = 2  # bits of the first head's values
    rewrite(path, layers=json.dumps(layers))
    with pytest.raises(ValueError, match="pages have layout"):
        SVDqCache.load(path, CONFIGS["llama"])


def test_tokens_on_their_way(path):
    cache = SVDqCache.load(path, CONFIGS["llama"])
    cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), 0)
    with pytest.raises(RuntimeError, match="before its new tokens are attended"):
        cache.save(path)
