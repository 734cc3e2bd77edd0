"""Caches in files: what is read back stands for the same tokens and goes on like the original."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from cache_support import CONFIGS, FINE, assert_same_state, make_model, make_tokens, snapshot
from calibration_support import calibration
from svdq import PageLayout, Profile, SVDqCache, cache_argument


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
    """The same file with other metadata, as an earlier version without checksums wrote it."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | metadata
    metadata.pop("checksum")
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


# Attributes that a cache has anew: callbacks, what the last step did, memory to grow into.
ANEW = {"attended", "step", "_step", "frequencies", "allocate", "settle", "_frequencies", "_free"}
ANEW |= {"_owners", "_page_data", "page_table", "_answer", "k_pages", "v_pages", "pages", "static"}
ANEW |= {"_sliding_window_tensor", "keys", "values"}  # compared by their contents elsewhere


def differences(a, b, name="cache", seen=None):
    """Names of attributes in which two objects differ, all the way down."""
    seen = set() if seen is None else seen
    if id(a) in seen:
        return []
    seen.add(id(a))
    if type(a) is not type(b):
        return [name]
    if isinstance(a, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return [] if same and torch.equal(a.nan_to_num(), b.nan_to_num()) else [name]
    if isinstance(a, PageLayout):  # which keeps what it was asked for
        return [] if a == b else [name]
    if isinstance(a, dict):
        return [name] if a.keys() != b.keys() else [
            x for key in a for x in differences(a[key], b[key], f"{name}[{key!r}]", seen)
        ]  # fmt: skip
    if isinstance(a, (list, tuple)):
        return [name] if len(a) != len(b) else [
            x for i in range(len(a)) for x in differences(a[i], b[i], f"{name}[{i}]", seen)
        ]  # fmt: skip
    if hasattr(a, "__dict__") and not callable(a):
        found = [] if vars(a).keys() - ANEW == vars(b).keys() - ANEW else [f"{name} has others"]
        both = vars(a).keys() & vars(b).keys() - ANEW
        for at in both:
            found += differences(getattr(a, at), getattr(b, at), f"{name}.{at}", seen)
        return found
    return [] if a == b or a != a and b != b else [name]  # NaN is the same as NaN


SETTINGS = {
    "default": {},
    "schedule": {"schedule": [4, 2, 1, 0], "clip": False, "sink_tokens": 3},
    "values": {"kv_bits": 2.5, "residual_length": 0},
    "waiting": {"kv_bits": 2.5, "min_fit_tokens": 500},
    "layer": {"k_bits": 1.5, "allocate_across": "layer"},
    "head": {"k_bits": 1.5, "allocate_across": "head"},
    "price": {"lambda_": 1e-3, "query_weighted": False},
    "outliers": {"k_bits": 1.25, "outlier_fraction": 0.05, "v_bits": 2},
    "hybrid": {"rope": "hybrid", "k_bits": 1.25, "pre_channels": 16},
    "landmarks": {"sparse_budget": [0.5, None], "sparse_scorer": "landmarks"},
    "sparse": {"sparse_budget": 0.25, "sparse_channels": 8, "refit_drift": 2.0},
    "static": {"max_cache_len": 600},
    "calibrated": {"calibration": "pre"},
    "own ranges": {"calibration": "post", "prompt_ranges": True},
    "out of domain": {"calibration": "hybrid", "refit_drift": 1.000001},
    "calibrated static": {"calibration": "both", "max_cache_len": 600},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_attribute_is_carried(tmp_path, name):
    settings = dict(SETTINGS[name])
    shared = calibration(settings.pop("calibration")) if "calibration" in settings else None
    model, cache = prefilled("llama", make_tokens(2, 400), {"calibration": shared, **settings})
    cache.save(tmp_path / "cache")
    loaded = SVDqCache.load(tmp_path / "cache", model.config, calibration=shared)
    cache.memory_report(), loaded.memory_report()
    assert differences(cache, loaded) == []


def test_widths_of_a_profile_are_carried(tmp_path):
    """After a reset, the next prompt is packed by them again."""
    model, plain = prefilled("llama", make_tokens(1, 400), {"k_bits": 2.0})
    spectra = {i: torch.rand(2, 64).sort(descending=True).values for i in range(2)}
    profile = Profile(spectra, "pre", 8, True, 400)
    cache = SVDqCache(model.config, k_bits=2.0, profile=profile)
    cache.save(tmp_path / "cache")
    loaded = SVDqCache.load(tmp_path / "cache", model.config)
    layouts = []
    for one in (cache, loaded, plain):
        one.reset()
        with torch.inference_mode():
            model(make_tokens(1, 400, seed=5), **cache_argument(one))
        layouts.append([layer.tokens.packed.layout for layer in one.layers])
    assert layouts[0] == layouts[1] != layouts[2]
