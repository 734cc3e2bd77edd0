"""The reference task: predict text whose distant past is in the cache under test.

Of every window of text the first ``prefill_tokens`` tokens are prefilled with exact attention, once
for all methods, and each method compresses their keys; the next ``predict_tokens`` tokens are
predicted in one forward pass, in which they see one another exactly and the prefilled tokens
through the cache. Key sparsity is for steps of one token, so caches that are tested with it are fed
these tokens one by one, and pack them as they leave the window. The prediction of the first of them
comes out of the prefill and is exact for every method; it counts like the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from svdq import cache_argument
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.matching import Matched, choose, describe
from svdq_bench.quality.methods import feeds_one_by_one, read_columns
from svdq_bench.quality.metrics import Scores, compare_logits
from svdq_bench.quality.models import check_length
from svdq_bench.quality.peers import FullCache
from svdq_bench.quality.prefix import Method, read_prefix


@dataclass(frozen=True)
class Task:
    """Windows of a text and how they are split.

    Parameters
    ----------
    window_starts : first token of every window.
    prefill_tokens, predict_tokens : tokens of a window that are prefilled and predicted.
    """

    window_starts: tuple[int, ...] = (5000, 40000)
    prefill_tokens: int = 3072
    predict_tokens: int = 1024

    @property
    def window_tokens(self) -> int:
        """Tokens of a window."""
        return self.prefill_tokens + self.predict_tokens

    def windows(self, token_ids: Tensor) -> list[Tensor]:
        """Cut the windows, each [1, window_tokens], out of a tokenized text [T]."""
        if self.prefill_tokens < 1 or self.predict_tokens < 1 or not self.window_starts:
            raise ValueError(
                "expected at least one window, one prefilled and one predicted token, got "
                f"{len(self.window_starts)}, {self.prefill_tokens} and {self.predict_tokens}"
            )
        for start in self.window_starts:
            if start < 0 or start + self.window_tokens > len(token_ids):
                raise ValueError(
                    f"a window of {self.window_tokens} tokens at token {start} does not fit "
                    f"into the text of {len(token_ids)} tokens"
                )
        return [token_ids[None, i : i + self.window_tokens] for i in self.window_starts]


@torch.inference_mode()
def prefill(model: PreTrainedModel, context: Tensor, cache: Cache) -> Tensor:
    """Put the first tokens, [1, T], into an empty cache: logits [1, vocabulary] of the next one."""
    return model(context, logits_to_keep=1, **cache_argument(cache)).logits[0, -1:]


@torch.inference_mode()
def predict(
    model: PreTrainedModel, tokens: Tensor, cache: Cache, first: Tensor, one_by_one: bool = False
) -> Tensor:
    """Logits that predict the tokens after a prefill: [N, vocabulary].

    Parameters
    ----------
    tokens : [1, N] int64; the last one is predicted, never fed.
    cache : a prefilled cache, which grows by N - 1 tokens.
    first : what :func:`prefill` returned, the prediction of the first of them.
    one_by_one : feed single tokens instead of all in one forward pass.
    """
    if tokens.shape[1] == 1:
        return first
    fed = tokens[:, :-1]
    steps = fed.split(1, dim=1) if one_by_one else [fed]
    return torch.cat([first, *(model(step, **cache_argument(cache)).logits[0] for step in steps)])


def evaluate_perplexity(
    model: PreTrainedModel,
    token_ids: Tensor,
    methods: Sequence[Method | Matched],
    task: Task,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Score the full cache and every method on the same windows, each prefilled once.

    Parameters
    ----------
    model : a causal language model with its default attention.
    token_ids : [T] int64, the whole text.
    methods : caches to compare with the full one.
    task : windows.
    begin : called with the name of each of the ``len(windows) * (1 + len(methods))`` steps as it
        begins.

    Returns
    -------
    One row for the full cache, then one for each method: what its ``columns`` and
    ``memory_columns`` give (the latter right after the prefill, means over the windows),
    perplexity, kl, top1_agreement, and what else describes the run. Methods that are fed one by one
    also tell what their last step read, see :meth:`CacheSettings.read_columns`.
    """
    check_length(model, task.window_tokens)
    methods = [FullCache(), *methods]
    scores = [Scores() for _ in methods]
    columns: list[dict] = [{} for _ in methods]
    memory: list[list[dict]] = [[] for _ in methods]
    for window in task.windows(token_ids):
        window = window.to(model.device)
        context, tokens = window.split([task.prefill_tokens, task.predict_tokens], dim=1)
        for index, method in enumerate(methods):
            begin(method.label)
            if index == 0:
                prefix = read_prefix(model, context)
            chosen = choose(method, prefix)
            cache = chosen.compress(prefix)
            columns[index] = describe(method, chosen)
            columns_now = chosen.memory_columns(cache)
            with attention(model, chosen.implementation):
                logits = predict(model, tokens, cache, prefix.first, feeds_one_by_one(chosen))
            memory[index].append(columns_now | read_columns(chosen, cache))
            if index == 0:
                reference = logits
            scores[index] += compare_logits(reference, logits, tokens[0])
    shared = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "prefill_tokens": task.prefill_tokens,
        "predict_tokens": task.predict_tokens,
        "window_starts": list(task.window_starts),
    }
    return [
        {"benchmark": "perplexity"} | columns[i] | mean_columns(memory[i]) | score_columns | shared
        for i, score_columns in enumerate(map(_score_columns, scores))
    ]


def mean_columns(rows: Sequence[dict]) -> dict:
    """Means of columns over several contexts; of what is no number, the first context's."""
    means = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        same = all(value == first for value in values) or not isinstance(first, (int, float))
        means[key] = first if same else statistics.fmean(values)
    return means


def _score_columns(score: Scores) -> dict[str, float]:
    return {
        "perplexity": score.perplexity,
        "kl": score.mean_kl,
        "top1_agreement": score.top1_agreement,
    }
