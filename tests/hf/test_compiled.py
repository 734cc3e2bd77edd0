"""Decode steps of a static cache compile to one graph and give the tokens of a growing cache."""

import pytest
import torch
from transformers import CompileConfig

from cache_support import make_model, make_tokens
from calibration_support import calibration
from svdq import SVDqCache, cache_argument

SETTINGS = {
    "schedule": {"schedule": [4, 2, 1, 0], "min_fit_tokens": 64},
    "allocated": {"k_bits": 2, "min_fit_tokens": 64},
    "hybrid": {"schedule": [4, 2, 1, 0], "min_fit_tokens": 64, "rope": "hybrid"},
}


def generate(model, settings, compiled=None, length=200):
    tokens = make_tokens(2, length)
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0
    cache = SVDqCache(model.config, **settings)
    options = {"disable_compile": True} if compiled is None else {"compile_config": compiled}
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=80,
        do_sample=False,
        **options,
        **cache_argument(cache),
    )
    return out, cache


def compile_config(fullgraph=True):
    config = CompileConfig(backend="eager", fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("name", [*SETTINGS, "calibrated"])
def test_compiled_tokens_are_those_of_a_growing_cache(name):
    torch._dynamo.reset()
    settings = SETTINGS.get(name) or {"calibration": calibration()}
    model = make_model()
    expected, _ = generate(model, settings)
    static = {**settings, "max_cache_len": 320}
    eager, _ = generate(model, static)
    torch._dynamo.utils.counters.clear()
    compiled, cache = generate(model, static, compile_config())
    assert torch.equal(eager, expected) and torch.equal(compiled, expected)
    assert cache.is_compileable and int(cache.get_seq_length()) == 279
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_short_prompts_run_between_graphs():
    torch._dynamo.reset()
    model, settings = make_model(), SETTINGS["schedule"]
    expected, _ = generate(model, settings, length=100)
    static = {**settings, "max_cache_len": 320}
    compiled, cache = generate(model, static, compile_config(fullgraph=False), length=100)
    assert torch.equal(compiled, expected) and cache.is_compileable


COMPILED = {
    "module": lambda model: torch.compile(model, backend="eager"),
    "forward": lambda model: torch.compile(model.forward, backend="eager"),
}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("name", [*SETTINGS, "exact"])
def test_growing_caches_run_between_graphs(how, name):
    """Calls of the cache break the graph, once to hand tokens over and once to attend."""
    torch._dynamo.reset()
    settings = SETTINGS.get(name, {"preset": "exact"})
    model, outputs = make_model(), []
    for run in (model, COMPILED[how](model)):
        cache = SVDqCache(model.config, **settings)
        with torch.inference_mode():
            outputs.append([
                run(make_tokens(1, n, seed=i), **cache_argument(cache)).logits
                for i, n in enumerate((200, 1, 1, 100, 1))
            ])  # fmt: skip
        assert cache.get_seq_length() == 303
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_generation_with_a_growing_cache():
    torch._dynamo.reset()
    model, settings = make_model(), SETTINGS["schedule"]
    expected, _ = generate(model, settings)
    model.forward = torch.compile(model.forward, backend="eager")
    actual, cache = generate(model, settings)
    assert torch.equal(actual, expected) and cache.get_seq_length() == 279
