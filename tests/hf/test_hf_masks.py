"""Masks that models and users give: causal ones in any form, others for a first prompt alone."""

import inspect

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from cache_support import CONFIGS, FINE, Driver, make_model, make_tokens, plain_attention
from svdq import SVDqCache, cache_argument
from svdq.cache.cache import CROP_ZERO_REMOVES
from svdq.hf.masks import CausalMask

LENGTH = 300


def run(attention, mask_of, steps=((LENGTH, 0), (1, 0), (5, 0)), batch=2, **settings):
    """Logits of a prompt and of steps with these masks, ``mask_of(start, length)``."""
    model = make_model("llama", attention)
    cache = DynamicCache(config=CONFIGS["llama"])
    if attention == "svdq":
        cache = SVDqCache(CONFIGS["llama"], **settings)
    outputs, start = [], 0
    with torch.inference_mode():
        for length, seed in steps:
            mask = mask_of(start, length)
            tokens = make_tokens(batch, length, seed=seed + length)
            out = model(tokens, attention_mask=mask, **cache_argument(cache))
            outputs.append(out.logits)
            start += length
    return outputs, cache


def causal(start, length, pad=0):
    own = torch.arange(start, start + length)[:, None]
    slots = torch.arange(start + length)
    seen = (slots <= own) & (slots >= pad)
    return seen | (own < pad) & (slots == own)  # padding sees itself


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


FORMS = {
    "bool": lambda start, length: causal(start, length)[None, None],
    "one a row": lambda start, length: causal(start, length)[None, None].expand(2, 1, -1, -1),
    "additive": lambda start, length: additive(causal(start, length))[None, None],
    "infinite": lambda start, length: additive(causal(start, length))[None, None] * torch.inf,
}


@pytest.mark.parametrize("form", ["bool", "one a row", "additive"])
def test_causal_masks_of_four_dimensions(form):
    """They say nothing, so all is as without a mask."""
    expected, full = run("svdq", lambda *_: None, **FINE)
    actual, cache = run("svdq", FORMS[form], **FINE)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert cache.layers[0].tokens.packed.slots == full.layers[0].tokens.packed.slots


def test_padding_in_masks_of_four_dimensions():
    def dense(start, length):
        return torch.stack([causal(start, length, pad) for pad in (0, 20)])[:, None]

    def flat(start, length):
        return torch.arange(start + length) >= torch.tensor([[0], [20]])

    positions = {"rope": "post"}  # the model counts positions from the mask of two dimensions
    expected, _ = run("svdq", flat, **FINE, **positions)
    actual, cache = run("svdq", dense, **FINE, **positions)
    assert [cache.layers[0].padding, cache.layers[1].padding] == [[0, 20], [0, 20]]
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        assert (ours - theirs).abs().max() <= 0.01 * theirs.abs().max()


def prefix(start, length):
    """Every token of a prompt's first 100 sees all of them: PaliGemma, images of Gemma 3."""
    seen = causal(start, length)
    if not start:
        seen[:100, :100] = True
    return seen[None, None]


def two_documents(start, length):
    seen = causal(start, length)
    if not start:
        seen[150:, :150] = False
    return seen[None, None]


@pytest.mark.parametrize("mask", [prefix, two_documents])
@pytest.mark.parametrize("form", [lambda x: x, additive], ids=["bool", "additive"])
@pytest.mark.parametrize("settings", [{"preset": "exact"}, FINE], ids=["exact", "fine"])
def test_a_first_prompt_attends_by_any_mask(mask, form, settings):
    expected, _ = run("sdpa", lambda *at: form(mask(*at)))
    actual, cache = run("svdq", lambda *at: form(mask(*at)), **settings)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() <= 0.01 * theirs.abs().max()
    assert cache.get_seq_length() == LENGTH + 6


def test_later_tokens_must_be_causal():
    model, cache = make_model("llama"), SVDqCache(CONFIGS["llama"])
    with torch.inference_mode():
        model(make_tokens(1, LENGTH), **cache_argument(cache))
        mask = torch.ones(1, 1, 5, LENGTH + 5, dtype=torch.bool)
        with pytest.raises(ValueError, match="for the first tokens alone, the cache holds 300"):
            model(make_tokens(1, 5), attention_mask=mask, **cache_argument(cache))
        assert cache.get_seq_length() == LENGTH
        model(make_tokens(1, 5), attention_mask=FORMS["bool"](LENGTH, 5), **cache_argument(cache))
    assert cache.get_seq_length() == LENGTH + 5


def test_a_mask_too_short():
    model, cache = make_model("llama"), SVDqCache(CONFIGS["llama"])
    mask = torch.ones(1, 1, 10, 9, dtype=torch.bool)
    with torch.inference_mode(), pytest.raises(ValueError, match="must cover 10 keys"):
        model(make_tokens(1, 10), attention_mask=mask, **cache_argument(cache))
    assert cache.get_seq_length() == 0


def made_by_transformers(**kwargs):
    parameters = inspect.signature(create_causal_mask).parameters
    embeds = ({"inputs_embeds", "input_embeds"} & set(parameters)).pop()
    kwargs[embeds] = torch.zeros(1, 10, 8)
    if "cache_position" in parameters:
        kwargs["cache_position"] = torch.arange(10)
    config = make_model("llama").config
    return create_causal_mask(config, attention_mask=None, **cache_argument(None), **kwargs)


def test_parts_that_see_each_other():
    mask = made_by_transformers(or_mask_function=lambda b, h, q, kv: kv < 5)
    assert isinstance(mask, CausalMask) and mask.padding is None
    assert mask.extra[0, 0, 0].tolist() == [True] * 5 + [False] * 5
    some = mask[:, :, -3:, :]
    assert torch.equal(some.dense, mask.dense[:, :, -3:, :])


def test_masks_that_hide_nothing():
    """SDPA knows them as no mask, which must not be taken for a causal one."""

    from svdq.hf.masks import svdq_mask

    sizes = {"q_length": 10} if not CROP_ZERO_REMOVES else {"cache_position": torch.arange(10)}
    mask = svdq_mask(
        batch_size=1,
        **sizes,
        kv_length=10,
        mask_function=lambda b, h, q, kv: (q >= 0) & (kv >= 0),
        allow_is_bidirectional_skip=True,
        allow_is_causal_skip=False,
    )
    assert mask.extra is not None and mask.extra.all()


def test_functions_that_add_nothing():
    """Gemma 3's token types are sent with every text; zeros are no images."""
    mask = made_by_transformers(or_mask_function=lambda b, h, q, kv: kv < 0)
    assert not mask.plain and mask.extra is None


@pytest.mark.parametrize("rows", [1, 3])
def test_masks_of_other_rows_than_the_batch(rows):
    driver = Driver(2, **FINE)
    mask = torch.arange(LENGTH).expand(rows, -1) >= 7
    if rows == 1:  # for all rows, as SDPA takes it
        driver.feed(LENGTH, attention_mask=mask)
        assert driver.layer.padding == [7, 7] and driver.layer.tokens.count(1) == LENGTH - 7
        return
    with pytest.raises(ValueError, match="attention_mask must have 2 rows, or one for all, got 3"):
        driver.feed(LENGTH, attention_mask=mask)
    assert driver.cache.get_seq_length() == 0


@pytest.mark.parametrize("settings", [{}, {"rope": "post"}, {"preset": "exact"}], ids=str)
@pytest.mark.parametrize(
    "chunks", [(64, 64, 72, 100), (100, 1, 99, 100), (150, 150), (80, 120, 100)]
)
def test_padding_that_fills_chunks(settings, chunks):
    """A prompt in chunks, of which some rows have padding alone: as the row without padding."""
    settings = {"schedule": [8], "v_bits": "exact", "min_fit_tokens": 80} | settings
    if "preset" in settings:
        settings = {"preset": "exact"}
    pads = torch.tensor([0, 170, 299])
    driver = Driver(3, **settings)
    query, keys, values = driver.draw(sum(chunks))
    start = 0
    for length in (*chunks, 1, 70):
        if start == sum(chunks):
            more = driver.draw(71)
            query, keys, values = (
                torch.cat([x, y], 2) for x, y in zip((query, keys, values), more, strict=True)
            )
        mask = torch.arange(start + length) >= pads[:, None]
        positions = (torch.arange(start, start + length) - pads[:, None]).clamp(min=0)
        part = [x[:, :, start : start + length] for x in (query, keys, values)]
        out = driver.attend(*part, attention_mask=mask, position_ids=positions)
        for b, pad in enumerate(pads.tolist()):
            new = slice(max(pad - start, 0), None)
            assert not out[b, : new.start].any()
            if pad < start + length:
                own = [x[b, :, pad : start + length] for x in (keys, values)]
                expected = plain_attention(part[0][b, :, new], *own)
                # Bases of 80 tokens for keys of 64 numbers; another token would change it by all.
                assert (out[b, new] - expected).abs().max() <= 0.15 * expected.abs().max()
        start += length
    assert [driver.layer.tokens.count(b) for b in range(3)] == [start - p for p in pads.tolist()]
    assert driver.cache.memory_report().total_bytes == driver.cache.allocated_bytes()


def test_rows_that_ended_are_continued_by_themselves():
    """What the error for holes says works, and gives the tokens of a row alone."""
    model, tokens = make_model("llama"), make_tokens(2, LENGTH)
    settings = {"schedule": [8], "v_bits": "exact"}
    together, alone = (SVDqCache(CONFIGS["llama"], **settings) for _ in range(2))
    turn = make_tokens(1, 20, seed=5)
    with torch.inference_mode():
        model(tokens, **cache_argument(together))
        model(tokens[1:], **cache_argument(alone))
        for seed in range(4):  # of which the second row's end is padding
            model(make_tokens(2, 1, seed=seed), **cache_argument(together))
            if seed < 2:
                model(make_tokens(2, 1, seed=seed)[1:], **cache_argument(alone))
        mask = torch.ones(2, LENGTH + 24, dtype=torch.long)
        mask[1, LENGTH + 2 : LENGTH + 4] = 0
        with pytest.raises(ValueError, match=r"batch_select_indices\(\[row\]\).*crop"):
            model(turn.expand(2, -1), attention_mask=mask, **cache_argument(together))
        assert together.get_seq_length() == LENGTH + 4
        together.batch_select_indices([1])
        together.crop(-2)
        actual = model(turn, **cache_argument(together)).logits
        expected = model(turn, **cache_argument(alone)).logits
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
