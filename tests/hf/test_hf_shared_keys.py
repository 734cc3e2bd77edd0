"""Models whose last layers attend to the keys of earlier ones: Gemma 3n and Gemma 4."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from cache_support import FINE, SIZES, make_tokens
from calibration_support import windows
from svdq import SVDqCache, cache_argument
from svdq_bench.quality.calibration import Windows, calibrate_bases

SHARED = SIZES | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 48,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
}
CONFIGS = {
    "gemma3n": transformers.Gemma3nTextConfig(
        **SHARED, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4
    )
}
if hasattr(transformers, "Gemma4TextConfig"):
    CONFIGS["gemma4"] = transformers.Gemma4TextConfig(**SHARED, global_head_dim=64)
CHUNKS = (300, 1, 30, 100, 1, 70)


def model_of(family, attention):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention).eval()


def run(family, attention, cache, **kwargs):
    model, outputs = model_of(family, attention), []
    with torch.inference_mode():
        for seed, length in enumerate(CHUNKS):
            tokens = make_tokens(2, length, seed=seed)
            outputs.append(model(tokens, **cache_argument(cache), **kwargs).logits)
    return outputs


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("settings", "error"),
    [({"preset": "exact"}, 1e-4), (FINE, 0.02), ({"rope": "post", **FINE}, 0.02)],
    ids=["exact", "pre", "post"],
)
@pytest.mark.parametrize("kept", [{}, {"logits_to_keep": 1}], ids=["all", "last"])
def test_logits_are_near_the_full_cache_s(family, settings, error, kept):
    """``logits_to_keep`` lets Gemma 4 ask for the last queries alone in layers that share."""
    expected = run(family, "sdpa", DynamicCache(config=CONFIGS[family]), **kept)
    cache = SVDqCache(CONFIGS[family], **settings)
    actual = run(family, "svdq", cache, **kept)
    assert len(cache.svdq_layers) == 1
    if "preset" not in settings:
        assert all(cache.svdq_layers[0].tokens.packed.slots)
    for ours, theirs in zip(actual, expected, strict=True):
        errors = (ours - theirs).abs().amax(2) / theirs.abs().max()
        # Norms of queries and keys make these random models choose between tokens sharply, so that
        # an error of a key may move a few logits far.
        assert errors.median() <= error and errors.quantile(0.9) <= 4 * error


@pytest.mark.parametrize("family", CONFIGS)
def test_generation(family):
    model, tokens = model_of(family, "sdpa"), make_tokens(1, 300)
    expected = model.generate(tokens, max_new_tokens=80, do_sample=False)
    cache = SVDqCache(CONFIGS[family], preset="exact")
    model.set_attn_implementation("svdq")
    options = {"max_new_tokens": 80, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options, **cache_argument(cache)), expected)
    assert torch.equal(model.generate(tokens, **options), expected)  # without this cache


def test_static_caches_are_refused():
    with pytest.raises(NotImplementedError, match="max_cache_len .* whose layers share keys"):
        SVDqCache(CONFIGS["gemma3n"], max_cache_len=512)


@pytest.mark.parametrize("family", CONFIGS)
def test_calibrated_bases(family):
    texts = [Windows("a", windows(), [])]
    found = calibrate_bases(model_of(family, "sdpa"), texts, {"k_bits": 2.0})
    cache = SVDqCache(CONFIGS[family], calibration=found)
    outputs = run(family, "svdq", cache)
    assert all(x.isfinite().all() for x in outputs)
    assert all(layer.tokens.packed.slots == [320, 320] for layer in cache.svdq_layers)
    assert cache.memory_report().key_basis == 0
