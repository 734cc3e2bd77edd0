"""Model families through the "svdq" attention: near the full cache where codes are fine."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from cache_support import CONFIGS, FINE, make_model, make_tokens
from svdq import SVDqCache, cache_argument
from svdq.cache.layer import SVDqLayer

CHUNKS = (300, 1, 1, 30, 100, 1)


def logits(model, cache, chunks=CHUNKS, batch=2):
    with torch.inference_mode():
        return [
            model(make_tokens(batch, n, seed=i), **cache_argument(cache)).logits
            for i, n in enumerate(chunks)
        ]


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", CONFIGS)
def test_fine_codes_are_near_the_full_cache(family, rope):
    """8-bit keys: every logit within 1 % of the largest; wrong tokens would change it by all."""
    full = logits(make_model(family, "sdpa"), DynamicCache(config=CONFIGS[family]))
    cache = SVDqCache(CONFIGS[family], rope=rope, **FINE)
    fine = logits(make_model(family), cache)
    assert all(any(layer.tokens.packed.slots) for layer in cache.svdq_layers)
    assert relative_error(fine[0], full[0]) < 1e-5  # the prompt is attended exactly
    for actual, expected in zip(fine[1:], full[1:], strict=True):
        assert relative_error(actual, expected) < 0.01


@pytest.mark.parametrize("family", CONFIGS)
def test_exact_settings_give_the_full_cache_s_logits(family):
    """Bit by bit: it is the same kernel on the same numbers."""
    full = logits(make_model(family, "sdpa"), DynamicCache(config=CONFIGS[family]))
    exact = logits(make_model(family), SVDqCache(CONFIGS[family], k_bits=16))
    for actual, expected in zip(exact, full, strict=True):
        assert torch.equal(actual, expected)


def test_hybrid_models_keep_their_sliding_layers():
    cache = SVDqCache(CONFIGS["gemma3"])
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, SVDqLayer]
    assert cache.is_sliding == [True, False]
    full = DynamicCache(config=CONFIGS["gemma3"])
    logits(make_model("gemma3"), cache)
    logits(make_model("gemma3", "sdpa"), full)
    assert torch.equal(cache.layers[0].keys, full.layers[0].keys)
    assert cache.get_seq_length() == full.get_seq_length()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype):
    cache = SVDqCache(CONFIGS["llama"], **FINE)
    half = logits(make_model("llama", dtype=dtype), cache)
    full = logits(make_model("llama", "sdpa", dtype), DynamicCache(config=CONFIGS["llama"]))
    for actual, expected in zip(half, full, strict=True):
        assert actual.dtype == dtype
        # A few roundings of 2^-8 or 2^-11 on the way through two layers, and 8-bit keys.
        assert relative_error(actual.float(), expected.float()) < 0.05


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_other_caches_are_attended_as_before(family, padded):
    """attn_implementation="svdq" with a cache of transformers, or none, is "sdpa"."""
    chunks = [make_tokens(2, n, seed=n) for n in (60, 1, 20)]
    mask = torch.ones(2, 81, dtype=torch.long)
    mask[1, : 25 if padded else 0] = 0
    outputs = []
    for attention in ("svdq", "sdpa"):
        model, cache, seen = make_model(family, attention), DynamicCache(config=CONFIGS[family]), 0
        outputs.append([])
        with torch.inference_mode():
            for chunk in chunks:
                seen += chunk.shape[1]
                out = model(chunk, attention_mask=mask[:, :seen], **cache_argument(cache))
                outputs[-1].append(out.logits)
            outputs[-1].append(
                model(chunks[0], attention_mask=mask[:, :60], use_cache=False).logits
            )
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_static_caches_are_attended_as_before():
    outputs = []
    for attention in ("svdq", "sdpa"):
        model = make_model("llama", attention)
        cache = StaticCache(config=model.config, max_cache_len=64)
        outputs.append(logits(model, cache, (20, 1, 30)))
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_says_what_to_do(attention):
    model, cache = make_model("llama", attention), SVDqCache(CONFIGS["llama"])
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="attn_implementation='svdq'"),
    ):
        model(make_tokens(1, 300), **cache_argument(cache))
    assert cache.get_seq_length() == 0
    model.set_attn_implementation("svdq")
    with torch.inference_mode():
        model(make_tokens(1, 300), **cache_argument(cache))
    assert cache.get_seq_length() == 300


@pytest.mark.parametrize(
    "use",
    [
        lambda new: new.shape,
        lambda new: new[:, :, -1],
        lambda new: torch.cat([new, new]),
        lambda new: torch.matmul(torch.ones(2), new),
        lambda new: torch.ones(2) @ new,
        lambda new: new * 2,
        lambda new: new.transpose(1, 2),
        lambda new: list(new),
        len,
    ],
)
def test_new_tokens_are_for_the_attention_alone(use):
    cache = SVDqCache(CONFIGS["llama"])
    new, _ = cache.update(torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64), 0)
    with pytest.raises(RuntimeError, match="attn_implementation='svdq'"):
        use(new)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"head_mask": torch.ones(4)},
        {"position_bias": torch.ones(4)},
        {"is_causal": False},
        {"dropout": 0.1},
        {"output_attentions": True},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_attention_cannot_do(kwargs):
    from cache_support import Driver

    driver = Driver(**FINE)
    with pytest.raises(NotImplementedError, match=f"does not support {next(iter(kwargs))}"):
        driver.feed(3, **kwargs)
    assert driver.cache.get_seq_length() == 0
    driver.feed(3, softcap=None, s_aux=None, sliding_window=None, is_causal=None, dropout=0.0)


def test_no_gradients():
    model, cache = make_model("llama"), SVDqCache(CONFIGS["llama"])
    with pytest.raises(NotImplementedError, match=r"gradients .*inference_mode"):
        model(make_tokens(1, 10), **cache_argument(cache))
    assert cache.get_seq_length() == 0
