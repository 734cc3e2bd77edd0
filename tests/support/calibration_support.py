"""Calibrations of small random models, made once for all tests of a process."""

import functools

import torch
from torch import Tensor

from cache_support import CONFIGS, make_model, make_tokens
from svdq import Calibration, SVDqCache, cache_argument
from svdq.cache.tensor_walk import nbytes
from svdq_bench.quality.calibration import Windows, calibrate_bases

WINDOW = 400
SETTINGS = {
    "pre": {"k_bits": 2.0},
    "post": {"k_bits": 2.0, "rope": "post"},
    "hybrid": {"k_bits": 2.0, "rope": "hybrid"},
    "both": {"kv_bits": 3.0},
    "schedule": {"schedule": [4, 4, 2, 0], "v_bits": "exact"},
}


def windows(count: int = 2) -> list[Tensor]:
    """Prompts [1, WINDOW] that a calibration is fitted on."""
    return [make_tokens(1, WINDOW, seed) for seed in range(count)]


@functools.cache
def calibration(name: str = "pre", family: str = "llama") -> Calibration:
    """A calibration of a model of :func:`cache_support.make_model` for some ``SETTINGS``."""
    texts = [Windows("a", windows()[:1], []), Windows("b", windows()[1:], [])]
    return calibrate_bases(make_model(family, "sdpa"), texts, SETTINGS[name])


def new_cache(name="pre", **settings):
    """An empty cache with a calibration."""
    return SVDqCache(CONFIGS["llama"], calibration=calibration(name), **settings)


@torch.inference_mode()
def feed(cache, tokens, **kwargs):
    """Logits [B, L, V] of more tokens."""
    return make_model()(tokens, **cache_argument(cache), **kwargs).logits


def prefilled(length=300, batch=1, name="pre", **settings):
    """A cache with a calibration and so many random tokens."""
    cache = new_cache(name, **settings)
    feed(cache, make_tokens(batch, length, seed=9))
    return cache


def codec_bytes(cache):
    """Bytes of bases, scales, means and gains that are a prompt's own."""
    report = cache.memory_report()
    return report.key_basis, report.key_scale, report.key_mean, report.key_gain


def shared_bytes(name="pre"):
    """Bytes of what was calibrated."""
    return sum(
        nbytes(x) for own in calibration(name).layers.values() for x in own.tensors().values()
    )
