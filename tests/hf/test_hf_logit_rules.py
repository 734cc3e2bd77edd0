"""Models with softcaps, learned sinks and sliding windows: Gemma 2 and GPT-OSS against "eager"."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from cache_support import (
    CONFIGS,
    FINE,
    RULED_CONFIGS,
    Driver,
    decoded,
    make_model,
    make_tokens,
)
from svdq import SVDqCache, cache_argument, reference
from svdq.cache.layer import SVDqLayer
from svdq.hf.logit_rules import logit_rules
from svdq.ops import LogitRules
from svdq.ops.exact import exact_attention
from svdq.store import dense

FAMILIES = list(RULED_CONFIGS)
# Steps, a chunk within FUSED_QUERIES and one beyond it, over pages and the sliding window of 48.
CHUNKS = (300, 1, 1, 30, 100, 1)
SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0])


def logits(model, cache, chunks=CHUNKS, batch=2, mask=None):
    outputs, seen = [], 0
    with torch.inference_mode():
        for i, n in enumerate(chunks):
            seen += n
            given = {} if mask is None else {"attention_mask": mask[:, :seen]}
            tokens = make_tokens(batch, n, seed=i)
            outputs.append(model(tokens, **given, **cache_argument(cache)).logits)
    return outputs


def assert_close(actual, expected, error):
    """Within a share of the largest logit, each."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < error


def eager(family, **kwargs):
    cache = DynamicCache(config=RULED_CONFIGS[family])
    return logits(make_model(family, "eager"), cache, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_settings_give_the_full_cache_s_logits(family):
    """Both compute in float32, in another order."""
    cache = SVDqCache(RULED_CONFIGS[family], preset="exact")
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, SVDqLayer]
    assert_close(logits(make_model(family), cache), eager(family), 1e-5)


@pytest.mark.libraries
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fine_codes_are_near_the_full_cache(family, rope, backend):
    cache = SVDqCache(RULED_CONFIGS[family], rope=rope, **FINE)
    fine, full = logits(make_model(family), cache), eager(family)
    assert all(any(layer.tokens.packed.slots) for layer in cache.svdq_layers)
    assert_close(fine[:1], full[:1], 1e-5)  # the prompt is attended exactly
    assert_close(fine[1:], full[1:], 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_default_settings_pack(family):
    """Widths, and bits of values where they are allocated, follow from the prompt."""
    for settings in ({}, {"kv_bits": 4.0}):
        cache = SVDqCache(RULED_CONFIGS[family], **settings)
        assert all(x.isfinite().all() for x in logits(make_model(family), cache))
        assert all(any(layer.tokens.packed.slots) for layer in cache.svdq_layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding(family):
    mask = torch.ones(2, sum(CHUNKS), dtype=torch.long)
    mask[1, :70] = 0
    cache = SVDqCache(RULED_CONFIGS[family], **FINE)
    fine = logits(make_model(family), cache, mask=mask)
    full = eager(family, mask=mask)
    assert_close([fine[0][0], fine[0][1, 70:]], [full[0][0], full[0][1, 70:]], 1e-5)
    assert_close(fine[1:], full[1:], 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_caches_and_none(family):
    """Layers that are not compressed are right too: "sdpa" would drop what it does not know."""
    chunks = (60, 1, 20)
    cache = DynamicCache(config=RULED_CONFIGS[family])
    ours = logits(make_model(family), cache, chunks)
    assert_close(ours, eager(family, chunks=chunks), 1e-5)
    with torch.inference_mode():
        alone = [
            make_model(family, name)(make_tokens(2, 60), use_cache=False).logits
            for name in ("svdq", "eager")
        ]
    assert_close(alone[:1], alone[1:], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_reordered_caches_go_on(family, tmp_path):
    model, config = make_model(family), RULED_CONFIGS[family]
    cache = SVDqCache(config, **FINE)
    logits(model, cache, (300, 1))
    cache.save(tmp_path / "cache.safetensors")
    loaded = SVDqCache.load(tmp_path / "cache.safetensors", config)
    ours = logits(model, cache, (1, 5))
    assert_close(logits(model, loaded, (1, 5)), ours, 1e-6)
    swapped = copy.deepcopy(loaded)
    swapped.reorder_cache(torch.tensor([1, 0]))
    tokens = make_tokens(2, 1, seed=9)
    with torch.inference_mode():
        plain = model(tokens, **cache_argument(loaded)).logits
        other = model(tokens.flip(0), **cache_argument(swapped)).logits
    assert_close([other.flip(0)], [plain], 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_beams(family):
    """Exact keys: the tokens are those of the full cache."""
    tokens, outputs = make_tokens(1, 80), []
    for attention in ("svdq", "eager"):
        model, config = make_model(family, attention), RULED_CONFIGS[family]
        cache = (
            SVDqCache(config, preset="exact")
            if attention == "svdq"
            else DynamicCache(config=config)
        )
        outputs.append(
            model.generate(
                tokens, num_beams=2, max_new_tokens=12, do_sample=False, **cache_argument(cache)
            )
        )
    assert torch.equal(*outputs)


def expected_step(driver, query, rules):
    """Attention of the last tokens in float64 to what the cache holds."""
    keys, values = decoded(driver.layer)
    length, total = query.shape[2], keys.shape[1]
    own = torch.arange(total - length, total)[:, None]
    seen = torch.arange(total) <= own
    if rules.window_size:
        seen &= torch.arange(total) > own - rules.window_size
    out, _ = reference.attend_keys(query[0], keys, values, seen, query.shape[-1] ** -0.5, rules)
    return out.transpose(0, 1)


@pytest.mark.libraries
@pytest.mark.parametrize("window", [20, 100, 230, 250, 1000])
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_sliding_windows_on_compressed_layers(rope, window, backend):
    """The window ends in the exact window, in pages, in the sinks, before all tokens."""
    driver = Driver(rope=rope, residual_length=30, **FINE)
    given = {"sliding_window": window, "softcap": 3.0, "s_aux": SINKS}
    rules = LogitRules(3.0, SINKS, window)
    driver.feed(210, **given)
    for length in (1, 3, 40, 1):
        query, keys, values = driver.draw(length)
        out = driver.attend(query, keys, values, **given)
        # 8-bit codes: a few in a thousand of a score of a few units.
        torch.testing.assert_close(
            out[0].double(), expected_step(driver, query, rules), rtol=0, atol=0.02
        )


def test_stores_of_several_bases_share_one_sink():
    """Each store is a call of its own; the sinks belong to one of them, the window to all."""
    driver = Driver(refit_drift=1.2, residual_length=30, **FINE)
    given = {"sliding_window": 300, "softcap": 3.0, "s_aux": SINKS}
    driver.feed(210, **given)
    for scale in (1.0, 6.0, 6.0):
        query, keys, values = driver.draw(130)
        driver.attend(query, keys.flip(-1) * scale, values, **given)
    assert len(driver.layer.tokens.stores) > 1
    query, keys, values = driver.draw(1)
    out = driver.attend(query, keys, values, **given)
    expected = expected_step(driver, query, LogitRules(3.0, SINKS, 300))
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=0.05)


def test_selected_tokens_take_sinks_alone():
    driver = Driver(sparse_budget=64, **FINE)
    for name, value in (("softcap", 3.0), ("sliding_window", 64)):
        with pytest.raises(NotImplementedError, match=f"sparse_budget.*{name}={value}"):
            driver.feed(300, **{name: value})
        assert driver.cache.get_seq_length() == 0
    driver.feed(300, s_aux=SINKS)
    query, keys, values = driver.draw(1)
    out = driver.attend(query, keys, values, s_aux=SINKS)
    assert driver.layer.tokens.attended == [64]
    # A head whose sink has nearly all of the softmax is nearly zero.
    large = Driver(sparse_budget=64, **FINE)
    large.feed(300, s_aux=SINKS + 40)
    small = large.attend(*large.draw(1), s_aux=SINKS + 40)
    assert small.abs().max() < 1e-6 < out.abs().max()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"softcap": -1.0}, "softcap must be .* -1"),
        ({"softcap": float("inf")}, "softcap must be"),
        ({"sliding_window": -3}, "sliding_window must be .* -3"),
        ({"s_aux": torch.zeros(3)}, r"s_aux must be \[4\].*\(3,\)"),
        ({"s_aux": torch.tensor([0.0, 1.0, torch.nan, 0.0])}, "s_aux must be finite"),
        ({"s_aux": torch.tensor([0.0, 1.0, -torch.inf, 0.0])}, "s_aux must be finite"),
    ],
)
def test_wrong_rules(given, message):
    driver = Driver(**FINE)
    with pytest.raises(ValueError, match=message):
        driver.feed(3, **given)
    assert driver.cache.get_seq_length() == 0
    driver.feed(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"dropout": 0.1}, "dropout=0.1"), ({"position_bias": torch.ones(4)}, "position_bias")],
)
def test_what_exact_attention_cannot_do(given, message):
    from svdq.hf.attention import svdq_attention

    query = torch.randn(1, 4, 3, 64)
    with pytest.raises(NotImplementedError, match=f"does not support {message}"):
        svdq_attention(Driver().module, query, query, query, None, softcap=3.0, **given)


def test_models_without_rules_have_none():
    for config in CONFIGS.values():
        names = {"softcap": None, "s_aux": None, "sliding_window": None}
        assert not logit_rules(torch.zeros(1, config.num_attention_heads, 1, 8), names)


@pytest.mark.parametrize("rules", [
    LogitRules(), LogitRules(2.0), LogitRules(0.0, SINKS), LogitRules(3.0, SINKS, 9),
])  # fmt: skip
@pytest.mark.parametrize("scores", [1, 600, 1 << 24])
def test_exact_attention_in_pieces(rules, scores, monkeypatch):
    """Pieces of one query, of some, and all at once; causal and with a mask."""
    monkeypatch.setattr("svdq.ops.exact.PIECE_SCORES", scores)
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, h, n, 16) for h, n in ((4, 21), (2, 50), (2, 50)))
    own, slots = torch.arange(29, 50)[:, None], torch.arange(50)
    seen = slots <= own
    if rules.window_size:
        seen &= slots > own - rules.window_size
    mask = seen.expand(2, 1, 21, 50).clone()
    mask[1, :, 4] = False  # a query that sees nothing
    for given in ({}, {"mask": mask}):
        out, lse = exact_attention(query, keys, values, 0.25, rules, **given)
        for b in range(2):
            visible = mask[b, 0] if given else seen
            expected = reference.attend_keys(query[b], keys[b], values[b], visible, 0.25, rules)
            torch.testing.assert_close(out[b].double(), expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[b].double(), expected[1], rtol=1e-5, atol=1e-5)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)[:, :, :4]
    out, _ = exact_attention(query[:, :, :4], keys, values, 0.25, rules, mask=additive)
    both = exact_attention(query[:, :, :4], keys, values, 0.25, rules, mask=mask[:, :, :4])
    torch.testing.assert_close(out, both[0])


def test_dense_attention_without_rules_is_as_before(monkeypatch):
    monkeypatch.setattr(dense, "exact_attention", None)
    query, keys = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 9, 16)
    assert dense.dense_attention(query, keys, keys, 0.25).shape == (1, 5, 4, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_values_knows_the_rules(family):
    """A prompt that a model has read gives the same measures as one that the cache attends."""
    from svdq_bench.quality.prefix import read_prefix

    model, config = make_model(family), RULED_CONFIGS[family]
    tokens = make_tokens(1, 300)
    with torch.inference_mode():
        prefix = read_prefix(model, tokens)
        caches = [SVDqCache(config, kv_bits=4.0) for _ in range(3)]
        model(tokens, **cache_argument(caches[0]))
        for cache, rules in zip(caches[1:], (prefix.rules, None), strict=True):
            cache.prefill_from(prefix.cache, prefix.query_energy, prefix.samples, rules)
    read, given, without = (cache.layers[1].tokens.fit.value_loss.noise for cache in caches)
    torch.testing.assert_close(given, read, rtol=1e-4, atol=0)
    assert not torch.allclose(without, read, rtol=1e-2)
