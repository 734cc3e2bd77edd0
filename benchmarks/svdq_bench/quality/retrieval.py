"""Retrieval from a compressed context: greedy answers to questions that come after it.

Every sample's context is prefilled exactly, once for all methods; each method compresses it, and
the model goes on with the question, in one forward pass, and its answer, token by token. Caches
that are tested with key sparsity are fed the question token by token, too, so that none of it sees
more than the budget. The full cache is a method like the others: what it cannot answer says nothing
about a cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from svdq import cache_argument
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.matching import Matched, choose, describe
from svdq_bench.quality.methods import feeds_one_by_one, read_columns
from svdq_bench.quality.models import check_length
from svdq_bench.quality.peers import FullCache
from svdq_bench.quality.perplexity import mean_columns
from svdq_bench.quality.prefix import Method, read_prefix
from svdq_bench.quality.tasks import ANSWER_TOKENS, DEPTH_TASKS, TASKS, Sample, SampleMaker


@dataclass(frozen=True)
class Sweep:
    """The samples to ask.

    Parameters
    ----------
    tasks : names out of :data:`svdq_bench.quality.tasks.TASKS`.
    context_tokens : lengths of contexts.
    depths : of the needle, for the tasks that ask for one.
    samples : of each task, length and depth.
    seed : any text; other seeds give other samples.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    context_tokens: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    seed: str = "0"

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise ValueError(f"tasks are {', '.join(TASKS)}, got {', '.join(self.tasks) or 'none'}")
        if self.samples < 1 or not self.context_tokens or not self.depths:
            raise ValueError(
                "expected at least one sample, context length and depth, got "
                f"{self.samples}, {len(self.context_tokens)} and {len(self.depths)}"
            )
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths must be 0 .. 1, got {self.depths}")

    def cells(self) -> list[tuple[str, int, float | None]]:
        """Task, length and depth of every group of samples."""
        return [
            (task, length, depth)
            for length in self.context_tokens
            for task in self.tasks
            for depth in (self.depths if task in DEPTH_TASKS else (None,))
        ]

    def make_samples(self, maker: SampleMaker) -> dict[tuple, list[Sample]]:
        """All samples by cell; each has a context of exactly its length."""
        return {
            (task, length, depth): [
                maker.sample(task, length, depth, f"{self.seed}/{i}") for i in range(self.samples)
            ]
            for task, length, depth in self.cells()
        }


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    cache: Cache,
    question: Tensor,
    max_tokens: int,
    stop: Callable[[list[int]], bool] = lambda tokens: False,
    one_by_one: bool = False,
) -> list[int]:
    """Feed a question into a filled cache and decode greedily.

    Parameters
    ----------
    question : [1, L] int64.
    max_tokens : length of the answer at most.
    stop : asked after every token whether the answer is complete.
    one_by_one : feed the question in steps of one token.
    """
    ends = _end_tokens(model)
    for part in question.split(1, dim=1) if one_by_one else [question]:
        logits = model(part, logits_to_keep=1, **cache_argument(cache)).logits
    tokens: list[int] = []
    while True:
        token = int(logits[0, -1].argmax())
        if token in ends:
            return tokens
        tokens.append(token)
        if len(tokens) == max_tokens or stop(tokens):
            return tokens
        fed = torch.tensor([[token]], device=question.device)
        logits = model(fed, **cache_argument(cache)).logits


def evaluate_retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method | Matched],
    samples: dict[tuple, list[Sample]],
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Ask every sample through the full cache and every method.

    Parameters
    ----------
    model : a causal language model with its default attention.
    methods : caches to compare with the full one.
    samples : what :meth:`Sweep.make_samples` gave.
    begin : called with the name of each step as it begins: one a sample.

    Returns
    -------
    A row for each task, length, depth and method, the full cache first: task, context_tokens, depth
    (None where the sample has its own places), the method's ``columns`` and mean
    ``memory_columns``, accuracy (mean share of the expected strings found), full_accuracy (the
    same of the full cache), squared_difference (mean square of what a sample's score lacks or
    exceeds the full cache's by), samples, dtype.
    """
    for _, length, _ in samples:
        check_length(model, length + max(ANSWER_TOKENS.values()))
    methods = [FullCache(), *methods]
    rows = []
    for (task, length, depth), group in samples.items():
        scores: list[list[float]] = [[] for _ in methods]
        columns: list[dict] = [{} for _ in methods]
        memory: list[list[dict]] = [[] for _ in methods]
        for sample in group:
            begin(f"{task}, {length} tokens" + ("" if depth is None else f", depth {depth:g}"))
            prefix = read_prefix(model, sample.context.to(model.device))
            for index, method in enumerate(methods):
                chosen = choose(method, prefix)
                cache = chosen.compress(prefix)
                columns[index] = describe(method, chosen)
                columns_now = chosen.memory_columns(cache)
                one_by_one = feeds_one_by_one(chosen)
                with attention(model, chosen.implementation):
                    scores[index].append(_ask(model, tokenizer, cache, sample, one_by_one))
                memory[index].append(columns_now | read_columns(chosen, cache))
        accuracies = [statistics.fmean(score) for score in scores]
        for index, accuracy in enumerate(accuracies):
            rows.append(
                {
                    "benchmark": "retrieval",
                    "task": task,
                    "context_tokens": length,
                    "depth": depth,
                    **columns[index],
                    **mean_columns(memory[index]),
                    "accuracy": accuracy,
                    "full_accuracy": accuracies[0],
                    "squared_difference": _squared_difference(scores[index], scores[0]),
                    "samples": len(group),
                    "dtype": str(model.dtype).removeprefix("torch."),
                }
            )
    return rows


def _squared_difference(scores: list[float], full: list[float]) -> float:
    """Mean square of the differences between two caches' scores of the same samples."""
    return statistics.fmean((a - b) ** 2 for a, b in zip(scores, full, strict=True))


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    sample: Sample,
    one_by_one: bool,
) -> float:
    """Score of the model's answer to a sample."""

    def score(tokens: list[int]) -> float:
        return sample.score(tokenizer.decode(tokens, skip_special_tokens=True))

    # Once all is found, nothing that follows can change the score.
    tokens = answer(
        model,
        cache,
        sample.question.to(model.device),
        ANSWER_TOKENS[sample.task],
        lambda tokens: score(tokens) == 1,
        one_by_one,
    )
    return score(tokens)


def _end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    if ends is None:
        return set()
    return {int(end) for end in (ends if isinstance(ends, Iterable) else [ends])}
