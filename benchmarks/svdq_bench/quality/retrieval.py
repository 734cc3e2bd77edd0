"""Retrieval from a compressed context: the answers to questions that come after it.

Every sample's context is prefilled exactly, once for all methods, and compressed once by each; then
each question goes on from a copy of the compressed cache. Scores are the log-likelihood of the
right answer, its probability, and the share of the expected strings that are found. Where the order
of the expected strings is fixed, all come out of one forward pass over question and answer; else
the answer is decoded greedily, token by token. Caches that are tested with key sparsity are fed
token by token, too, so that no token sees more than the budget. The full cache is a method like the
others: what it cannot answer says nothing about a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from svdq import cache_argument
from svdq_bench.quality.forced import force, fork_cache
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.intervals import interval
from svdq_bench.quality.matching import Matched, choose, describe
from svdq_bench.quality.methods import feeds_one_by_one, read_columns
from svdq_bench.quality.models import check_length
from svdq_bench.quality.peers import FullCache
from svdq_bench.quality.perplexity import mean_columns
from svdq_bench.quality.prefix import Method, read_prefix
from svdq_bench.quality.puzzles import ANSWER_TOKENS, TASKS
from svdq_bench.quality.tasks import Question, Sample, SampleMaker, has_depth


@dataclass(frozen=True)
class Sweep:
    """The samples to ask.

    Parameters
    ----------
    tasks : names out of :data:`svdq_bench.quality.puzzles.TASKS`.
    context_tokens : lengths of contexts.
    depths : of the needle, where one is asked for.
    samples : contexts of each task, length and depth.
    seed : any text; other seeds give other samples.
    questions : about each context.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    context_tokens: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    seed: str = "0"
    questions: int = 1

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
            for depth in (self.depths if has_depth(task, self.questions) else (None,))
        ]

    def make_samples(self, maker: SampleMaker) -> dict[tuple, list[Sample]]:
        """All samples by cell; each has a context of exactly its length."""
        return {
            (task, length, depth): [
                maker.sample(task, length, depth, f"{self.seed}/{i}", self.questions)
                for i in range(self.samples)
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
    decode: bool = False,
) -> list[dict]:
    """Ask every sample's questions through the full cache and every method.

    Parameters
    ----------
    model : a causal language model with its default attention.
    methods : caches to compare with the full one.
    samples : what :meth:`Sweep.make_samples` gave.
    begin : called with the name of each step as it begins: one a sample.
    decode : score what the model decodes freely, for all tasks.

    Returns
    -------
    A row for each task, length, depth and method, the full cache first: task, context_tokens, depth
    (None where the sample has its own places), the method's ``columns`` and mean
    ``memory_columns``, the columns of :func:`score_columns` for ``accuracy`` and, where answers are
    fixed, ``log_likelihood`` and ``probability``, scored ("decoded" or "forced"), contexts, samples
    (questions), dtype.
    """
    for _, length, _ in samples:
        check_length(model, length + max(ANSWER_TOKENS.values()))
    methods = [FullCache(), *methods]
    rows = []
    for (task, length, depth), group in samples.items():
        answers: list[list[list[Answer]]] = [[] for _ in methods]
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
                asking = Asking(model, tokenizer, task, decode, feeds_one_by_one(chosen))
                with attention(model, chosen.implementation):
                    found, fed = asking.ask_all(cache, sample.questions)
                answers[index].append(found)
                memory[index].append(columns_now | read_columns(chosen, fed))
        for index in range(len(methods)):
            scores = {}
            for key in ("accuracy", "log_likelihood", "probability"):
                scores |= score_columns(key, answers[index], answers[0])
            forced = not decode and "log_likelihood" in scores
            rows.append(
                {
                    "benchmark": "retrieval",
                    "task": task,
                    "context_tokens": length,
                    "depth": depth,
                    **columns[index],
                    **mean_columns(memory[index]),
                    **scores,
                    "scored": "forced" if forced else "decoded",
                    "contexts": len(group),
                    "samples": sum(len(sample.questions) for sample in group),
                    "dtype": str(model.dtype).removeprefix("torch."),
                }
            )
    return rows


@dataclass(frozen=True)
class Answer:
    """Scores of a question; no log-likelihood where the order of the answer is open."""

    accuracy: float
    log_likelihood: float | None

    @property
    def probability(self) -> float | None:
        """Of the right answer: the accuracy of answers that are drawn instead of greedy."""
        return None if self.log_likelihood is None else math.exp(self.log_likelihood)


def score_columns(
    key: str, answers: Sequence[Sequence[Answer]], full: Sequence[Sequence[Answer]]
) -> dict[str, float]:
    """Columns of a score, and of its difference from the full cache's on the same questions.

    Parameters
    ----------
    key : a score of :class:`Answer`.
    answers, full : of a method and of the full cache, by context.

    Returns
    -------
    ``KEY`` and ``full_KEY``, means over questions; ``KEY_difference``, the mean difference;
    ``KEY_square``, mean over contexts of the squared mean difference of a context, for pooling; and
    ``KEY_half_width`` of the difference's 95 % confidence interval, from the spread of contexts,
    where there are several. Empty for a score that was not taken.
    """
    own, others = ([[getattr(a, key) for a in group] for group in x] for x in (answers, full))
    if any(value is None for group in own for value in group):
        return {}
    pairs = zip(own, others, strict=True)
    difference = interval([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs])
    columns = {
        key: interval(own).mean,
        f"full_{key}": interval(others).mean,
        f"{key}_difference": difference.mean,
        f"{key}_square": difference.square,
    }
    if difference.half_width is not None:
        columns[f"{key}_half_width"] = difference.half_width
    return columns


@dataclass(frozen=True)
class Asking:
    """How questions of a task are asked.

    Parameters
    ----------
    decode : decode the answers that could be fed, too.
    one_by_one : feed single tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: str
    decode: bool
    one_by_one: bool

    def ask_all(self, cache: Cache, questions: Sequence[Question]) -> tuple[list[Answer], Cache]:
        """Answers to questions that each go on from a filled cache, and a cache after the last."""
        found = []
        for question in questions:
            fed = fork_cache(cache)
            found.append(self._ask(cache, fed, question))
        return found, fed

    def _ask(self, cache: Cache, fed: Cache, question: Question) -> Answer:
        """Ask through ``fed``, a fork of the cache; score a right answer through another one."""
        if question.answer is None:
            return Answer(self._decoded(fed, question), None)
        if not self.decode:
            forced = force(self.model, fed, question, self.one_by_one)
            return Answer(forced.accuracy, forced.log_likelihood)
        forced = force(self.model, fork_cache(cache), question, self.one_by_one)
        return Answer(self._decoded(fed, question), forced.log_likelihood)

    def _decoded(self, cache: Cache, question: Question) -> float:
        """Score of the model's greedy answer."""

        def score(tokens: list[int]) -> float:
            return question.score(self.tokenizer.decode(tokens, skip_special_tokens=True))

        # Once all is found, nothing that follows can change the score.
        tokens = answer(
            self.model,
            cache,
            question.tokens.to(self.model.device),
            ANSWER_TOKENS[self.task],
            lambda tokens: score(tokens) == 1,
            self.one_by_one,
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
