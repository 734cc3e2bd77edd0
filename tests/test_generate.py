"""``generate`` with an SVDqCache: every way of decoding, alone and in padded batches."""

import copy

import pytest
import torch
from transformers import DynamicCache

from cache_support import CONFIGS, FINE, make_model, make_tokens
from svdq import SVDqCache

PROMPT, NEW = 300, 80  # the window of 64 is passed while generating


def full_cache(family):
    return DynamicCache(config=CONFIGS[family])


def generate(model, tokens, cache, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False} | kwargs
    torch.manual_seed(3)
    return model.generate(tokens, past_key_values=cache, **kwargs)


def decode_by_hand(model, tokens, cache, steps=NEW, **kwargs):
    """Greedy decoding as a user writes it."""
    with torch.inference_mode():
        logits = model(tokens, past_key_values=cache, **kwargs).logits[:, -1]
        for step in range(steps):
            chosen = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], 1)
            if step < steps - 1:
                logits = model(chosen, past_key_values=cache).logits[:, -1]
    return tokens


@pytest.mark.parametrize("family", CONFIGS)
def test_exact_settings_give_the_full_cache_s_tokens(family):
    tokens = make_tokens(2, PROMPT)
    expected = generate(make_model(family, "sdpa"), tokens, full_cache(family))
    cache = SVDqCache(CONFIGS[family], k_bits=16)
    assert torch.equal(generate(make_model(family), tokens, cache), expected)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"rope": "post", "v_bits": 2}], ids=["pre", "post"])
def test_generate_is_a_loop_written_by_hand(family, settings):
    model, tokens = make_model(family), make_tokens(2, PROMPT)
    cache, by_hand = (SVDqCache(CONFIGS[family], **settings) for _ in range(2))
    assert torch.equal(generate(model, tokens, cache), decode_by_hand(model, tokens, by_hand))
    assert cache.get_seq_length() == by_hand.get_seq_length() == PROMPT + NEW - 1
    assert cache.memory_report() == by_hand.memory_report()


DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "chunked prompt": {"prefill_chunk_size": 100},
    "prompt lookup": {"prompt_lookup_num_tokens": 5, "eos_token_id": 1},
}


@pytest.mark.parametrize("kwargs", DECODING.values(), ids=DECODING)
def test_every_way_of_decoding_with_exact_settings(kwargs):
    tokens = make_tokens(1, PROMPT)
    expected = generate(make_model("llama", "sdpa"), tokens, full_cache("llama"), **kwargs)
    exact = SVDqCache(CONFIGS["llama"], preset="exact")
    assert torch.equal(generate(make_model("llama"), tokens, exact, **kwargs), expected)


@pytest.mark.parametrize("kwargs", DECODING.values(), ids=DECODING)
def test_every_way_of_decoding_with_fine_codes(kwargs):
    """Scores within 1 % of the full cache's (test_hf_models.py) leave these tokens the same."""
    tokens = make_tokens(1, PROMPT)
    expected = generate(make_model("llama", "sdpa"), tokens, full_cache("llama"), **kwargs)
    fine = SVDqCache(CONFIGS["llama"], **FINE)
    actual = generate(make_model("llama"), tokens, fine, **kwargs)
    assert (actual == expected).float().mean() > 0.95
    assert all(slots >= 256 for slots in fine.layers[0].tokens.packed.slots)


@pytest.mark.parametrize("settings", [{"preset": "exact"}, {}], ids=["exact", "packed"])
def test_assisted_generation(settings):
    """A model that assists itself: nearly all its guesses are right, some are taken back."""
    tokens = make_tokens(1, PROMPT)
    model, assistant = make_model("llama"), make_model("llama")
    alone = generate(model, tokens, SVDqCache(CONFIGS["llama"], **settings))
    cache = SVDqCache(CONFIGS["llama"], **settings)
    assisted = generate(model, tokens, cache, assistant_model=assistant)
    agreement = (alone == assisted[:, : alone.shape[1]]).float().mean()
    # Pages are packed at other moments where tokens come several at a time, so codes differ.
    assert agreement == 1 if settings else agreement > 0.85
    assert cache.memory_report().total_bytes == cache.allocated_bytes()


def left_padded(prompts):
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("settings", [{}, {"rope": "post"}, {"preset": "exact"}], ids=str)
def test_padded_batch_equals_the_sequences_alone(family, settings):
    model = make_model(family)
    prompts = [make_tokens(1, length, seed=length) for length in (PROMPT, 400, 190, 3)]
    ids, mask = left_padded(prompts)
    cache = SVDqCache(CONFIGS[family], **settings)
    together = generate(model, ids, cache, attention_mask=mask)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, SVDqCache(CONFIGS[family], **settings))
        assert torch.equal(together[row], alone[0, prompt.shape[1] :])
    store = cache.svdq_layers[0].tokens
    assert [store.count(b) for b in range(4)] == [n + NEW - 1 for n in (PROMPT, 400, 190, 3)]


def test_padded_beams():
    model, prompts = make_model("llama"), [make_tokens(1, n, seed=n) for n in (PROMPT, 350)]
    ids, mask = left_padded(prompts)
    cache = SVDqCache(CONFIGS["llama"])
    together = generate(model, ids, cache, attention_mask=mask, num_beams=3)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, SVDqCache(CONFIGS["llama"]), num_beams=3)
        assert torch.equal(together[row], alone[0, prompt.shape[1] :])


def test_padding_without_position_ids():
    """A bare call counts positions from the padding on; the cache follows."""
    ids, mask = left_padded([make_tokens(1, n, seed=n) for n in (PROMPT, 400)])
    outputs = []
    for attention, cache in (
        ("svdq", SVDqCache(CONFIGS["llama"], **FINE)),
        ("sdpa", full_cache("llama")),
    ):
        model = make_model("llama", attention)
        with torch.inference_mode():
            prompt = model(ids, attention_mask=mask, past_key_values=cache).logits
            longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
            step = model(make_tokens(2, 1), attention_mask=longer, past_key_values=cache).logits
        outputs.append((prompt[:, 100:], step))
        if attention == "svdq":
            assert cache.layers[0].tokens.packed.first_position.tolist() == [100, 0]
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).abs().max() <= 0.01 * theirs.abs().max()


def test_conversation_goes_on_in_the_same_cache():
    model = make_model("llama")
    first = make_tokens(1, PROMPT)
    cache = SVDqCache(CONFIGS["llama"])
    answer = generate(model, first, cache)
    second = torch.cat([answer, make_tokens(1, 150, seed=9)], 1)
    cache_by_hand = SVDqCache(CONFIGS["llama"])
    decode_by_hand(model, first, cache_by_hand)
    expected = decode_by_hand(model, second[:, cache_by_hand.get_seq_length() :], cache_by_hand)
    actual = generate(model, second, cache)
    assert torch.equal(actual[:, -NEW:], expected[:, -NEW:])


def test_prompt_is_reused_by_copies():
    model, prompt = make_model("llama"), make_tokens(1, PROMPT)
    prefix = SVDqCache(CONFIGS["llama"])
    with torch.inference_mode():
        model(prompt, past_key_values=prefix)
    for seed in (1, 2):
        question = torch.cat([prompt, make_tokens(1, 20, seed=seed)], 1)
        reused = generate(model, question, copy.deepcopy(prefix))
        fresh = SVDqCache(CONFIGS["llama"])
        with torch.inference_mode():
            model(prompt, past_key_values=fresh)
        assert torch.equal(reused, generate(model, question, fresh))
    assert prefix.get_seq_length() == PROMPT


def test_one_token_prompt():
    model, tokens = make_model("llama"), make_tokens(1, 1)
    cache = SVDqCache(CONFIGS["llama"], min_fit_tokens=100)
    assert generate(model, tokens, cache, max_new_tokens=200).shape == (1, 201)
    assert cache.layers[0].tokens.packed.slots == [128]


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad])
def test_cache_lives_through_both_modes(first, then):
    """A cache filled under inference mode goes on under no_grad, which generate uses, and back."""
    model, cache = make_model("llama"), SVDqCache(CONFIGS["llama"])
    for mode in (first, then, first):
        with mode():
            model(make_tokens(1, PROMPT), past_key_values=cache)
            cache.crop(-20)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([1, 0]))
            for _ in range(70):
                model(make_tokens(2, 1), past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]))
    assert cache.get_seq_length() == 3 * (PROMPT - 20 + 70)
