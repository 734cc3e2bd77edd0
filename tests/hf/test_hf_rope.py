"""Un-rotating keys: a configuration gives the frequencies that its model rotates by."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    SmolLM3Config,
)

from cache_support import CONFIGS, GQA, SIZES
from svdq import SVDqCache, cache_argument
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


def test_layers_that_do_not_rotate_pack_keys_as_they_come():
    config = SmolLM3Config(**SIZES, **GQA, no_rope_layers=[1, 0])
    assert [layer.settings.rope for layer in SVDqCache(config).svdq_layers] == ["pre", "post"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CohereConfig(**SIZES), "interleaved"),
        (llama({"rope_type": "dynamic", "factor": 2.0}), "rope type is 'dynamic'"),
        (llama({"rope_type": "default", "mrope_section": [8, 12, 12]}), "several sections"),
        (GPT2Config(n_layer=2), "no rope_theta"),
    ],
    ids=["interleaved", "dynamic", "mrope", "no rotation"],
)
def test_keys_that_cannot_be_unrotated(config, reason):
    with pytest.raises(NotImplementedError, match=f'cannot un-rotate .*{reason}.*Use rope="post"'):
        SVDqCache(config)
    assert SVDqCache(config, rope="post").svdq_layers
    assert SVDqCache(config, preset="exact").svdq_layers
