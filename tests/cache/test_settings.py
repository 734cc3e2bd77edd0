"""Settings: one validated value, built by keyword, under today's names and those of before."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cache_support import CONFIGS, Driver, assert_same_state, snapshot
from svdq import PageLayout, Profile, Settings, SVDqCache
from svdq.config import presets
from svdq.config.presets import PRESETS

# Names in files of the version before, by today's.
OLD_SETTINGS = {"pre_channels": "core_channels"}
OLD_TENSORS = {"gain": "weight", "post_mean": "tail_mean", "outlier_min_error": "outlier_least"}


def in_old_names(path, settings=OLD_SETTINGS, tensors=OLD_TENSORS):
    """Rewrite a file as the version before wrote it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = {settings.get(name, name): x for name, x in json.loads(metadata["settings"]).items()}
    old.pop("preset", None)
    metadata.pop("checksum", None)
    metadata["settings"] = json.dumps(old)
    renamed = {}
    for name, x in named.items():
        *parents, own = name.split(".")
        renamed[".".join([*parents, tensors.get(own, own)])] = x
    save_file(renamed, path, metadata)


def test_presets_become_schedules():
    settings = Settings(preset="paper-1.25")
    assert (settings.preset, settings.schedule) == (None, PRESETS["paper-1.25"])
    assert not settings.query_weighted and settings.v_bits == 4
    for exact in (Settings(k_bits=16), Settings(preset="exact")):
        assert (exact.preset, exact.schedule, exact.k_bits, exact.v_bits) == (
            "exact", None, None, "exact",
        )  # fmt: skip
        assert not exact.packs


def test_defaults_are_averages():
    settings = Settings()
    assert (settings.kv_bits, settings.k_bits, settings.v_bits) == (presets.KV_BITS, None, None)
    assert settings.query_weighted and settings.allocates and settings.allocates_values
    settings = Settings(v_bits=3)
    assert (settings.kv_bits, settings.k_bits, settings.v_bits) == (None, presets.K_BITS, 3)
    assert not settings.allocates_values
    settings = Settings(k_bits=1.5)
    assert (settings.kv_bits, settings.k_bits, settings.v_bits) == (None, 1.5, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 2, "v_bits": 4}, "kv_bits says the bits of values too"),
        ({"kv_bits": 2, "k_bits": 1}, "give one of preset"),
        ({"kv_bits": 1}, r"kv_bits must be above 1.0 and at most 6.0, got 1"),
        ({"kv_bits": 6.5}, "kv_bits must be above"),
        ({"preset": "paper-1.25", "v_bits": 2.5}, "is an average: give k_bits"),
        ({"k_bits": 1, "v_bits": 4.5}, r"v_bits must be one of .* or between 2 and 4"),
        ({"k_bits": 1, "v_bits": 2.5, "allocate_across": "head"}, "across the model or each layer"),
        ({"lambda_": 1, "v_bits": 2.5}, "across the model or each layer"),
    ],
    ids=str,
)
def test_budgets_that_contradict_others(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "exact"},
        {"kv_bits": 3},
        {"k_bits": 1, "v_bits": 2.5},
        {"k_bits": 1.5},
        {"lambda_": 0.1},
        {"schedule": [4, 2]},
    ],
)
def test_settings_make_themselves_again(options):
    settings = Settings(**options)
    assert Settings(**dataclasses.asdict(settings)) == settings
    assert dataclasses.replace(settings, rope="post") == Settings(**options, rope="post")


def test_settings_stay_as_they_are():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().rope = "post"
    with pytest.raises(TypeError):
        Settings("paper-1.25")
    with pytest.raises(ValueError, match="rope must be one of"):
        Settings(rope="half")


def test_the_old_name_of_pre_channels_works_with_a_warning():
    with pytest.warns(FutureWarning, match="core_channels is now pre_channels") as caught:
        cache = SVDqCache(CONFIGS["llama"], rope="hybrid", core_channels=16)
    assert cache.settings.pre_channels == 16
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="pre_channels or its old name core_channels, not both"):
        SVDqCache(CONFIGS["llama"], core_channels=16, pre_channels=8)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="post_channels"):
        SVDqCache(CONFIGS["llama"], post_channels=16)


@pytest.mark.parametrize(
    "options",
    [
        {"rope": "hybrid", "pre_channels": 16, "query_weighted": True, "outlier_fraction": 0.02},
        {"preset": "exact"},
    ],
    ids=["hybrid", "exact"],
)
def test_files_of_the_version_before(tmp_path, options):
    driver = Driver(**options)
    driver.feed(400)
    driver.cache.save(tmp_path / "cache")
    in_old_names(tmp_path / "cache")
    loaded = SVDqCache.load(tmp_path / "cache", driver.config)
    assert loaded.settings == driver.cache.settings
    assert_same_state(snapshot(loaded), snapshot(driver.cache))


def test_profiles_of_the_version_before(tmp_path):
    profile = Profile({0: torch.rand(2, 64)}, "hybrid", 16, True, 100)
    profile.save(tmp_path / "profile")
    in_old_names(tmp_path / "profile")
    loaded = Profile.load(tmp_path / "profile")
    assert (loaded.rope, loaded.pre_channels, loaded.num_tokens) == ("hybrid", 16, 100)


def test_bands_of_layouts_come_from_settings():
    settings = Settings(rope="hybrid", schedule=[8, 4, 4, 2, 0, 0, 0, 0], pre_channels=8)
    pre, post = settings.scheduled_bands(64)
    layout = settings.layout([post], 64, torch.float32, [pre])
    assert layout == PageLayout(64, ((0, 16, 8, 0),), "hybrid", pre_bands=((8, 0, 0, 0),))
    assert Settings(k_bits=1.0, rope="hybrid").pre_bits(64) == 0.5
