"""SmolLM2 decodes through the emulated CUDA kernels as on the CPU."""

import pytest
import torch

from svdq import _C, SVDqCache, cache_argument
from svdq_bench.quality.models import find_model, load_model, load_tokenizer, tokenize
from svdq_bench.quality.texts import load_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "emulated" not in _C.backends(), reason="the extension was built without emulation"
    ),
]
PROMPT, NEW = 252, 6


@pytest.fixture(scope="module")
def prompt():
    try:
        source = find_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokens = tokenize(load_tokenizer(source), load_text()[:4000])[None, :PROMPT]
    model = load_model(source, torch.float32)
    model.set_attn_implementation("svdq")
    return model, tokens


def decode(backend, prompt, **settings):
    """Tokens and logits of a greedy answer that is long enough to pack a page on the way."""
    model, tokens = prompt
    before = _C.backend()
    _C.set_backend(backend)
    try:
        cache = SVDqCache(model.config, min_fit_tokens=128, **settings)
        with torch.inference_mode():
            answer = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                **cache_argument(cache),
                do_sample=False,
                min_new_tokens=NEW,
                max_new_tokens=NEW,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=model.config.eos_token_id,
            )
    finally:
        _C.set_backend(before)
    slots = {slot for layer in cache.layers for slot in layer.tokens.packed.slots}
    return answer.sequences[0, PROMPT:].tolist(), torch.stack(answer.logits), slots


@pytest.mark.parametrize(
    "settings",
    [{"rope": "pre"}, {"rope": "post"}, {"rope": "pre", "sparse_budget": 0.25}],
    ids=["pre", "post", "sparse"],
)
def test_smollm2_decodes_the_same_tokens(prompt, settings):
    expected, expected_logits, expected_slots = decode(_C.backends()[0], prompt, **settings)
    got, logits, slots = decode("emulated", prompt, **settings)
    assert slots == expected_slots == {192}
    # Up to a token that the two take differently, if any, they have read the same.
    same = next((i for i in range(NEW) if got[i] != expected[i]), NEW)
    read = min(same + 1, NEW)
    divergence = torch.nn.functional.kl_div(
        logits[:read].log_softmax(-1),
        expected_logits[:read].log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    # Codes at rounding ties, tokens at the edge of being selected and the two kinds of arithmetic:
    # far below what quantizing costs.
    assert divergence / read < 1e-3
    if same < NEW:  # only where the two tokens are as good as equally likely
        chances = expected_logits[same].flatten().softmax(-1)
        assert chances[expected[same]] - chances[got[same]] < 0.02
        assert same >= NEW // 2
