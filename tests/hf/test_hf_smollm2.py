"""A real model: SmolLM2-135M-Instruct on a text that every Python installation has."""

import copy

import pytest
import torch
from transformers import DynamicCache

from svdq import SVDqCache, cache_argument
from svdq_bench.quality.models import find_model, load_model, load_tokenizer, tokenize
from svdq_bench.quality.texts import load_text

pytestmark = pytest.mark.slow  # loading the model alone takes some ten seconds
PROMPT, HELD_BACK = 512, 128


class Prompt:
    """A model and the exact keys and values of its prompt, to fill any number of caches from."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens[:, :PROMPT]
        self.text = tokens[:, PROMPT : PROMPT + HELD_BACK]
        self.full = DynamicCache(config=model.config)
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            model(self.tokens, **cache_argument(self.full), logits_to_keep=1)
            self.log_probs = self.predict("sdpa", copy.deepcopy(self.full))

    def fill(self, length=PROMPT, **settings):
        """An SVDqCache that the first tokens of the prompt have gone through."""
        cache = SVDqCache(self.model.config, **settings)
        for layer, full in zip(cache.layers, self.full.layers, strict=True):
            keys, values = (x[:, :, :length] for x in (full.keys, full.values))
            new, _ = cache.update(keys, values, layer.index)
            module = self.model.model.layers[layer.index].self_attn
            layer.attend(keys.repeat_interleave(module.num_key_value_groups, 1), new)
        return cache

    def predict(self, attention, cache):
        """Log probabilities of every token after those of the text, [T, V]."""
        self.model.set_attn_implementation(attention)
        with torch.inference_mode():
            return self.model(self.text, **cache_argument(cache)).logits[0].log_softmax(-1)

    def divergence(self, **settings):
        """KL divergence from the full cache, the prompt packed down to its sinks, values exact."""
        cache = self.fill(residual_length=0, v_bits="exact", **settings)
        assert all(layer.tokens.packed.slots == [PROMPT] for layer in cache.layers)
        other = self.predict("svdq", cache)
        return (self.log_probs.exp() * (self.log_probs - other)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def prompt():
    try:
        source = find_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokens = tokenize(load_tokenizer(source), load_text()[:8000])[None]
    return Prompt(load_model(source, torch.float32), tokens)


def test_prediction_survives_compression(prompt):
    """The order that the method promises: more bits, un-rotated keys and sinks are each better."""
    found = {
        "8 bits": prompt.divergence(schedule=[8]),
        "1.25 bits": prompt.divergence(preset="paper-1.25"),
        "1.25 bits, rotated": prompt.divergence(preset="paper-1.25", rope="post"),
        "1.25 bits, no sinks": prompt.divergence(preset="paper-1.25", sink_tokens=0),
    }
    assert list(found.values()) == sorted(found.values()), found
    assert found["8 bits"] < 1e-3 and found["1.25 bits"] < 0.1, found


def test_generates_the_full_cache_s_text(prompt):
    outputs = []
    full = copy.deepcopy(prompt.full)
    full.crop(-1)
    exact = prompt.fill(PROMPT - 1, preset="exact")
    for attention, cache in (("sdpa", full), ("svdq", exact)):
        prompt.model.set_attn_implementation(attention)
        tokens = prompt.model.generate(
            prompt.tokens,
            **cache_argument(cache),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
        )
        outputs.append(tokens)
    assert torch.equal(*outputs)
