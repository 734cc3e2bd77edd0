"""Models that drop a cache where their rotation changes: the user's stays in use."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from cache_support import SIZES, make_tokens
from svdq import SVDqCache, cache_argument
from svdq.cache.cache import CROP_ZERO_REMOVES

ORIGINAL = 256
HALF = 16  # of rotary pairs


def config_of(family):
    factors = {"short_factor": [1.0] * HALF, "long_factor": [4.0] * HALF}
    scaling = {"type": "longrope", **factors}
    if family == "phimoe":
        scaling |= {"short_mscale": 1.0, "long_mscale": 1.0}
        scaling["original_max_position_embeddings"] = ORIGINAL
    sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 4096}
    if family == "phi3":
        return transformers.Phi3Config(
            **sizes, original_max_position_embeddings=ORIGINAL, rope_scaling=scaling
        )
    config = transformers.PhimoeConfig(
        **sizes, rope_scaling=scaling, num_local_experts=2, num_experts_per_tok=2
    )
    config.original_max_position_embeddings = ORIGINAL
    return config


def generate(model, tokens, cache, new, **kwargs):
    options = {"max_new_tokens": new, "do_sample": False} | kwargs
    return model.generate(tokens, **options, **cache_argument(cache))


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
@pytest.mark.parametrize(
    ("prompt", "new"), [(400, 20), (240, 30), (255, 3), (256, 3), (257, 3), (100, 20)]
)
def test_the_cache_that_was_given_is_used(family, prompt, new):
    config = config_of(family)
    if family == "phimoe" and CROP_ZERO_REMOVES:
        with pytest.raises(NotImplementedError, match="'phimoe': .* outside of the attention"):
            SVDqCache(config)
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tokens = make_tokens(1, prompt)
    expected = generate(model, tokens, DynamicCache(config=config), new)
    model.set_attn_implementation("svdq")
    cache = SVDqCache(config, preset="exact")
    actual = generate(model, tokens, cache, new)
    # Where transformers 4 reads a sequence again, it does so by the mask of its last token.
    assert CROP_ZERO_REMOVES or torch.equal(actual, expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    packed = SVDqCache(config, min_fit_tokens=64)
    assert generate(model, tokens, packed, new).shape == expected.shape
    assert packed.get_seq_length() == expected.shape[1] - 1
    if prompt > 200:
        assert all(packed.svdq_layers[0].tokens.packed.slots)


def test_a_batch_with_padding():
    config = config_of("phi3")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tokens, mask = make_tokens(2, 240), torch.ones(2, 240, dtype=torch.long)
    mask[1, :50] = 0
    expected = generate(model, tokens, DynamicCache(config=config), 30, attention_mask=mask)
    model.set_attn_implementation("svdq")
    cache = SVDqCache(config, preset="exact")
    actual = generate(model, tokens, cache, 30, attention_mask=mask)
    assert CROP_ZERO_REMOVES or torch.equal(actual, expected)
    assert cache.get_seq_length() == 269


def test_other_caches_are_dropped_as_before():
    config = config_of("phi3")
    SVDqCache(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    generate(model, make_tokens(1, 400), cache, 2)
    assert cache.get_seq_length() == 0
