"""Teacher forcing: how likely a model finds the right answer, in one forward pass.

The question is fed with its right answer. The log-likelihood of the answer is a continuous score,
so it tells caches apart with fewer questions than hits and misses do. The same pass tells the
greedy answer: an expected string is what greedy decoding would give if each of its tokens has the
largest logit after the right tokens before it.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from svdq import cache_argument
from svdq_bench.quality.prefix import fork
from svdq_bench.quality.tasks import Question


@dataclass(frozen=True)
class Forced:
    """Scores of a right answer that was fed.

    Parameters
    ----------
    log_likelihood : of the expected strings, in nats, the sum over their tokens.
    accuracy : share of the expected strings that greedy decoding gives after what comes before.
    """

    log_likelihood: float
    accuracy: float


def fork_cache(cache: Cache) -> Cache:
    """A cache that goes on from another one without changing it."""
    # Other caches write into their tensors.
    return fork(cache) if type(cache) is DynamicCache else copy.deepcopy(cache)


@torch.inference_mode()
def force(
    model: PreTrainedModel, cache: Cache, question: Question, one_by_one: bool = False
) -> Forced:
    """Feed a question and its answer into a filled cache.

    Parameters
    ----------
    question : one with an answer.
    one_by_one : feed single tokens instead of all in one forward pass.
    """
    answer = question.answer.to(model.device)
    tokens = torch.cat([question.tokens.to(model.device), answer], dim=1)[:, :-1]
    return score(answer_logits(model, cache, tokens, answer.shape[1], one_by_one), question)


def answer_logits(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, num_answer: int, one_by_one: bool
) -> Tensor:
    """Logits [A, vocabulary] after the last ``num_answer`` of the fed tokens [1, N]."""
    if not one_by_one:
        return model(tokens, logits_to_keep=num_answer, **cache_argument(cache)).logits[0]
    steps = [
        model(step, logits_to_keep=1, **cache_argument(cache)).logits[0, -1]
        for step in tokens.split(1, dim=1)
    ]
    return torch.stack(steps[-num_answer:])


def score(logits: Tensor, question: Question) -> Forced:
    """Scores from the logits [A, vocabulary] that predict an answer's tokens."""
    answer = question.answer[0].to(logits.device)
    logs = logits.double().log_softmax(dim=-1)
    likelihood = logs.gather(1, answer[:, None])[:, 0].tolist()
    is_greedy = (logits.argmax(dim=-1) == answer).tolist()
    return Forced(
        sum(likelihood[i] for span in question.spans for i in span),
        statistics.fmean(all(is_greedy[i] for i in span) for span in question.spans),
    )
