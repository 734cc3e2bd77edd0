"""The demo: one model and one long prompt, with the full cache and with svdq, in one run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from svdq import cache_argument
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.memory import full_cache_bytes
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.metrics import Scores, compare_logits
from svdq_bench.quality.models import check_length
from svdq_bench.quality.perplexity import predict
from svdq_bench.quality.prefix import Prefix, read_prefix

# The caches take turns in blocks of this many tokens, so that a busy moment of the machine meets
# both. The first block warms up; the first token of a block, which generate() prepares, does not
# count either.
BLOCK_TOKENS = 8
QUESTION = "Explain in your own words, in several paragraphs, what the text above is about."
# The default text begins with the answer, so it comes out of the oldest packed pages.
DEFAULT_TEXT_QUESTION = "What does the assert statement do? Explain it and give an example."

Begin = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class Prompt:
    """A long text between the head and the tail of a chat, and how the text goes on.

    Parameters
    ----------
    context : [1, T] int64, head and text: what is prefilled.
    tail : [1, L] int64, the question and what makes the model answer it.
    held_back : [1, N] int64, the text that follows the context.
    """

    context: Tensor
    tail: Tensor
    held_back: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads before it answers."""
        return self.context.shape[1] + self.tail.shape[1]


@dataclass
class Run:
    """Results of one cache on the prompt."""

    name: str
    implementation: str | None
    cache: Cache
    logits: Tensor | None = None
    scores: Scores = field(default_factory=Scores)
    text: str = ""
    token_seconds: list[float] = field(default_factory=list)


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text_ids: Tensor,
    prompt_tokens: int,
    held_back_tokens: int,
    question: str = QUESTION,
) -> Prompt:
    """Put the beginning of a text and a question about it into the model's chat template, if any.

    Parameters
    ----------
    text_ids : [T] int64, the tokenized text.
    prompt_tokens : tokens of it that go into the prompt.
    held_back_tokens : tokens after them that are predicted, never shown.
    """
    if prompt_tokens < 1 or held_back_tokens < 1:
        raise ValueError(
            f"expected at least one prompt and one held-back token, got {prompt_tokens} and "
            f"{held_back_tokens}"
        )
    if len(text_ids) < prompt_tokens + held_back_tokens:
        raise ValueError(
            f"the text has {len(text_ids)} tokens, {prompt_tokens} for the prompt and "
            f"{held_back_tokens} held back are asked for"
        )
    mark = "\N{PILCROW SIGN}text\N{PILCROW SIGN}"
    head, tail = "", f"\n\n{question}\n\n"
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": f"{mark}\n\n{question}"}]
        chat = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        head, tail = chat.split(mark)

    def encode(part: str) -> Tensor:
        ids = tokenizer(part, add_special_tokens=False).input_ids
        return torch.tensor(ids, dtype=torch.long)

    context = torch.cat([encode(head), text_ids[:prompt_tokens]])
    held_back = text_ids[prompt_tokens : prompt_tokens + held_back_tokens]
    return Prompt(context[None], encode(tail)[None], held_back[None])


def check_new_tokens(new_tokens: int) -> None:
    """Refuse answers too short to time."""
    min_tokens = BLOCK_TOKENS + 2
    if new_tokens < min_tokens:
        raise ValueError(f"expected at least {min_tokens} new tokens to time, got {new_tokens}")


class TokenClock(BaseStreamer):
    """Notes when ``generate`` hands out each token; the first thing it hands out is the prompt."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.on_token = on_token
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the time of one token."""
        if self.times:
            self.on_token()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is buffered."""

    @property
    def token_seconds(self) -> list[float]:
        """Seconds of every token but the first, which waits for what ``generate`` prepares."""
        tokens = self.times[1:]
        return [after - before for before, after in zip(tokens, tokens[1:], strict=False)]


@contextmanager
def layer_progress(model: PreTrainedModel, on_layer: Callable[[], None]) -> Iterator[None]:
    """Call a function after each attention layer of a forward pass."""
    hooks = [
        module.register_forward_hook(lambda *_: on_layer()) for module in _attention_layers(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attention_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [
        module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)
    ]


@torch.inference_mode()
def read_prompt(model: PreTrainedModel, prompt: Prompt, begin: Begin) -> tuple[Prefix, float]:
    """Prefill the context once for all caches, under the model's own attention; and the seconds."""
    step = begin("prefill", len(_attention_layers(model)))
    start = time.perf_counter()
    with layer_progress(model, step):
        prefix = read_prefix(model, prompt.context)
    return prefix, time.perf_counter() - start


@torch.inference_mode()
def predict_held_back(
    model: PreTrainedModel, prompt: Prompt, prefix: Prefix, run: Run, begin: Begin
) -> None:
    """Predict the held-back text with a copy of a cache."""
    step = begin(f"held-back text, {run.name}", 1)
    with attention(model, run.implementation):
        run.logits = predict(model, prompt.held_back, copy.deepcopy(run.cache), prefix.first)
    step()


@torch.inference_mode()
def generate_in_turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    runs: list[Run],
    new_tokens: int,
    begin: Begin,
) -> None:
    """Let every cache generate its answer, a block of tokens each in turn, and time the tokens.

    ``generate`` goes on from a copy of the prefilled cache, as transformers' guide for reusing a
    prefix does, and from its own last token in later blocks. The answers are greedy and have
    ``new_tokens`` tokens whatever they are, so that all times are over equally many steps.
    """
    start = torch.cat([prompt.context, prompt.tail], dim=1)
    answers = [start for _ in runs]
    caches = [copy.deepcopy(run.cache) for run in runs]
    steps = [begin(f"decode, {run.name}", new_tokens) for run in runs]
    for done in range(0, new_tokens, BLOCK_TOKENS):
        block = min(BLOCK_TOKENS, new_tokens - done)
        for i, run in enumerate(runs):
            clock = TokenClock(steps[i])
            with attention(model, run.implementation):
                answers[i] = model.generate(
                    answers[i],
                    attention_mask=torch.ones_like(answers[i]),
                    **cache_argument(caches[i]),
                    streamer=clock,
                    do_sample=False,
                    min_new_tokens=block,
                    max_new_tokens=block,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                )
            if done:
                run.token_seconds += clock.token_seconds
    for run, answer in zip(runs, answers, strict=True):
        run.text = tokenizer.decode(answer[0, start.shape[1] :], skip_special_tokens=True)


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    settings: CacheSettings,
    new_tokens: int,
    begin: Begin,
) -> tuple[list[dict], Run, Run]:
    """Run the full cache under the model's default attention, and svdq, on one prefill.

    Returns
    -------
    rows : one per cache: method, perplexity, kl and top1_agreement on the held-back text,
        cache_bytes after the prefill, cache_ratio, prefill_seconds (read once for both),
        compress_seconds, decode_ms (median, see ``BLOCK_TOKENS``), decode_mean_ms,
        tokens_per_second, text, and the settings.
    full, compressed : the runs themselves, for the picture.
    """
    check_new_tokens(new_tokens)
    longest_end = max(prompt.tail.shape[1] + new_tokens, prompt.held_back.shape[1])
    check_length(model, prompt.context.shape[1] + longest_end)
    prefix, prefill_seconds = read_prompt(model, prompt, begin)
    step = begin("compress the prompt's keys and values", 1)
    start = time.perf_counter()
    packed = settings.compress(prefix)
    compress_seconds = time.perf_counter() - start
    step()
    runs = [Run("full cache", None, prefix.cache), Run("svdq", "svdq", packed)]
    for run in runs:
        predict_held_back(model, prompt, prefix, run, begin)
    generate_in_turns(model, tokenizer, prompt, runs, new_tokens, begin)
    full, compressed = runs
    targets = prompt.held_back[0]
    for run in runs:
        run.scores = compare_logits(full.logits, run.logits, targets)
    number_bits = 8 * model.dtype.itemsize
    full_columns = {"method": "full cache", "k_bits": number_bits, "all_in_bits": number_bits}
    full_columns["cache_bytes"] = full_cache_bytes(full.cache)
    full_columns["cache_ratio"] = 1.0
    rows = [full_columns, settings.columns() | settings.memory_columns(compressed.cache)]
    for row, run in zip(rows, runs, strict=True):
        row |= {
            "perplexity": run.scores.perplexity,
            "kl": run.scores.mean_kl,
            "top1_agreement": run.scores.top1_agreement,
            "prefill_seconds": prefill_seconds,
            "compress_seconds": compress_seconds if run is compressed else 0.0,
        }
        row |= decode_columns(run.token_seconds)
        row |= {
            "prompt_tokens": prompt.num_tokens,
            "cached_tokens": prompt.context.shape[1],
            "held_back_tokens": len(targets),
            "new_tokens": new_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": "svdq" if run is compressed else model.config._attn_implementation,
            "text": run.text,
        }
    return [{"benchmark": "demo"} | row for row in rows], full, compressed


def decode_columns(token_seconds: list[float]) -> dict[str, float]:
    """Median and mean time of a decode step, and tokens per second of the median."""
    median = statistics.median(token_seconds)
    return {
        "decode_ms": median * 1e3,
        "decode_mean_ms": statistics.fmean(token_seconds) * 1e3,
        "tokens_per_second": 1 / median,
    }
