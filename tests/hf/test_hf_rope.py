"""Un-rotating keys: a configuration gives the frequencies that its model rotates by."""

import logging

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    SmolLM3Config,
)

import svdq.cache.build
import svdq.hf.rotation
from cache_support import CONFIGS, GQA, SIZES, decoded, make_tokens
from svdq import SVDqCache, cache_argument
from svdq.cache.cache import CROP_ZERO_REMOVES
from svdq.cache.layer import SVDqLayer
from svdq.hf.rope import inverse_frequencies
from svdq.reference import rotate

LONG, POSITION = 64, 57
HALF = GQA["head_dim"] // 2
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
}


def llama(scaling, **changes):
    return LlamaConfig(**SIZES, **GQA, rope_scaling=scaling, **changes)


def phi3():
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(HALF)], "long_factor": [9.0] * HALF}
    sizes = SIZES | {"num_attention_heads": 2, "max_position_embeddings": 4 * LONG}
    return Phi3Config(
        **sizes,
        original_max_position_embeddings=LONG,
        rope_scaling={"type": "longrope", **factors},
    )


MODELS = {
    **CONFIGS,
    **{name: llama(scaling) for name, scaling in SCALINGS.items()},
    "rope_theta": llama(None, rope_theta=1e6),
    "longrope": phi3(),
}


def keys_at(model, positions, layer_idx, monkeypatch):
    """Keys of layer ``layer_idx``, [H, 1, D], of one token alone at each of these positions."""
    caught = []
    update = SVDqLayer.update

    def watched_update(layer, keys, *args, **kwargs):
        if layer.index == layer_idx:
            caught.append(keys[0])
        return update(layer, keys, *args, **kwargs)

    monkeypatch.setattr(SVDqLayer, "update", watched_update)
    with torch.inference_mode():
        for position in positions:
            where = torch.tensor([[position]])
            cache = SVDqCache(model.config, rope="post")
            model(torch.tensor([[7]]), position_ids=where, **cache_argument(cache))
    return caught


@pytest.mark.parametrize("name", MODELS)
def test_unrotated_keys_do_not_know_their_position(name, monkeypatch):
    """One token alone gives the same key at any position, except for its rotation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="svdq").eval()
    layer_idx = SVDqCache(model.config, rope="post").svdq_layers[0].index
    here, there = keys_at(model, [0, POSITION], layer_idx, monkeypatch)
    inv_freq = inverse_frequencies(model.config, layer_idx, POSITION)
    back = rotate(there, torch.tensor([POSITION]), inv_freq, inverse=True)
    # Keys are float32 and their angles, up to 57, rounded to it: 57 * 2^-24 relative to a pair.
    tolerance = 2 * (POSITION + 2) * 2**-24 * here.abs().max().item()
    assert (back - here).abs().max() <= tolerance
    assert (there - here).abs().max() > 100 * tolerance


def test_long_sequences_turn_by_long_factors(monkeypatch):
    short, long = (inverse_frequencies(phi3(), 0, n) for n in (LONG - 1, LONG))
    assert torch.allclose(short[5] * (1.0 + 0.5) / 9.0, long[5])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(phi3(), attn_implementation="svdq").eval()
    here, there = keys_at(model, [LONG, LONG + 9], 0, monkeypatch)
    unrotated = rotate(there, torch.tensor([9]), long, inverse=True)
    assert (unrotated - here).abs().max() <= 2 * (LONG + 11) * 2**-24 * here.abs().max()


def test_frequencies_are_chosen_when_the_basis_is_fitted():
    model = AutoModelForCausalLM.from_config(phi3(), attn_implementation="svdq").eval()
    cache = SVDqCache(model.config, residual_length=0, min_fit_tokens=1)
    with torch.inference_mode():
        model(torch.full((1, 200), 7), **cache_argument(cache))
    for layer in cache.svdq_layers:
        assert torch.equal(layer.tokens.packed.codec.inv_freq, inverse_frequencies(phi3(), 0, 199))
        assert layer.tokens.packed.codec.inv_freq is cache._frequencies.known[0]


NOPE = {
    "smollm3": lambda: SmolLM3Config(**SIZES, **GQA, no_rope_layers=[1, 0]),
    "exaone4": lambda: transformers.Exaone4Config(
        **SIZES, **GQA, sliding_window=48, layer_types=["sliding_attention", "full_attention"]
    ),
    "cohere2": lambda: transformers.Cohere2Config(
        **SIZES, sliding_window=48, layer_types=["sliding_attention", "full_attention"]
    ),
    "afmoe": lambda: transformers.AfmoeConfig(
        **SIZES, **GQA, sliding_window=48, layer_types=["sliding_attention", "full_attention"],
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_dense_layers=1,
    ),
    "exaone moe": lambda: transformers.ExaoneMoeConfig(
        **SIZES, **GQA, sliding_window=48, layer_types=["sliding_attention", "full_attention"],
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    ),
    "granite": lambda: transformers.GraniteMoeHybridConfig(
        **SIZES, num_key_value_heads=2, position_embedding_type="nope", num_local_experts=0,
        layer_types=["attention", "attention"], shared_intermediate_size=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOPE)
def test_layers_that_do_not_rotate_pack_keys_as_they_come(name, caplog):
    """No configuration says it by the same name; nothing is warned of, as nothing is lost."""
    try:
        config = NOPE[name]()
    except AttributeError:
        pytest.skip("not in this transformers")
    if name == "granite" and CROP_ZERO_REMOVES:
        pytest.skip("transformers 4 has another cache for it")
    with caplog.at_level(logging.WARNING):
        cache = SVDqCache(config)
    assert cache.svdq_layers[-1].settings.rope == "post"
    assert cache.svdq_layers[-1].frequencies is None
    assert "un-rotated" not in caplog.text


def test_observed_keys_of_a_layer_that_does_not_rotate():
    """Coded as they come: as near to the model's own as with rope="post"."""
    if not hasattr(transformers, "Exaone4Config"):
        pytest.skip("not in this transformers")
    config = NOPE["exaone4"]()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="svdq").eval()
    for layer in model.model.layers:  # keys of rank 8, as real heads nearly have
        weight = layer.self_attn.k_proj.weight.data.view(2, 64, 128)
        weight.copy_(torch.randn(2, 64, 8) @ torch.randn(2, 8, 128) * 0.05)
    tokens = make_tokens(1, 1000)
    full = DynamicCache(config=config)
    with torch.inference_mode():
        model(tokens, **cache_argument(full))
        for rope in ("pre", "hybrid", "post"):
            cache = SVDqCache(config, preset="paper-1.25", rope=rope)
            model(tokens, **cache_argument(cache))
            keys = decoded(cache.layers[1])[0]
            errors = (keys - full.layers[1].keys[0]).square().sum()
            assert errors < 0.05 * full.layers[1].keys.square().sum()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CohereConfig(**SIZES), "interleaved"),
        (llama({"rope_type": "dynamic", "factor": 2.0}), "rope type is 'dynamic'"),
        (GPT2Config(n_layer=2, n_embd=64, n_head=4), "no rope_theta"),
    ],
    ids=["interleaved", "dynamic", "no rotation"],
)
def test_keys_that_cannot_be_unrotated_are_packed_as_they_come(config, reason, caplog):
    """Said once, with the reason; not where it was asked for."""
    logging.getLogger("transformers").propagate = True
    svdq.cache.build.logger.warning_once.cache_clear()
    for options in ({"rope": "post"}, {"preset": "exact"}):
        SVDqCache(config, **options)
        assert not caplog.text
    for rope in ("pre", "hybrid"):
        layers = SVDqCache(config, rope=rope).svdq_layers
        assert {layer.settings.rope for layer in layers} == {"post"}
    assert caplog.text.count("are packed as they come (rope='post')") == 1
    assert reason in caplog.text


def test_keys_that_are_rotated_by_other_frequencies_than_their_configuration_s(monkeypatch):
    config = llama(None)
    monkeypatch.setattr(
        svdq.hf.rotation, "inverse_frequencies", lambda *_: 1.001 * inverse_frequencies(config, 0)
    )
    found = svdq.hf.rotation.rotation_of(config, 0)
    assert found.rotates and "something else" in found.reason


def test_observing_leaves_no_trace():
    config = llama({"rope_type": "linear", "factor": 3.0})
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert svdq.hf.rotation.rotation_of(config, 0).reason is None
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert config.hidden_size == SIZES["hidden_size"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.DeepseekV2Config(num_hidden_layers=2), "latent of 512 numbers"),
        (lambda: transformers.DeepseekV3Config(num_hidden_layers=2), "latent of 512 numbers"),
        (lambda: LlamaConfig(**SIZES, head_dim=72), "head_dim 72"),
        (lambda: LlamaConfig(**SIZES, head_dim=528), "head_dim 528"),
        (lambda: LlamaConfig(**{**SIZES, "hidden_size": 120}), "head_dim 30"),
    ],
)
def test_keys_that_cannot_be_packed(make, message):
    for settings in ({}, {"preset": "exact"}):
        with pytest.raises(NotImplementedError, match=message):
            SVDqCache(make(), **settings)
