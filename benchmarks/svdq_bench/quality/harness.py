"""lm-evaluation-harness over compressed contexts, for those who have it installed.

``harness_model`` gives a model to ``lm_eval.simple_evaluate`` whose contexts are prefilled exactly,
compressed by a method, and gone on from. The last token of a context stays out of the cache and is
fed first, so that even a continuation of one token is predicted through it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from svdq import cache_argument
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.matching import Matched, choose, describe
from svdq_bench.quality.peers import FullCache
from svdq_bench.quality.perplexity import mean_columns
from svdq_bench.quality.prefix import Method, Prefix, fork, read_prefix

# Makes a cache of a context, and names the attention implementation that goes on from it.
Filler = Callable[[], tuple[Cache, str | None]]


def import_harness() -> Any:
    """The package ``lm_eval``.

    Raises
    ------
    ImportError
        With how to install it.
    """
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise ImportError(
            f"lm-evaluation-harness is not installed ({error}); run 'pip install svdq[harness]'"
        ) from error
    return lm_eval


class CompressedContexts:
    """``HFLM`` except for contexts, which go into a cache. One sequence at a time.

    Attributes
    ----------
    compressed, too_short : caches filled (one for each continuation or generation, of all tasks)
        that the method compressed, and that it could not.
    memory : ``memory_columns`` of those it compressed.
    """

    def prepare(self, method: Method | Matched, allow_short: bool) -> None:
        """Say what compresses, and whether contexts that are too short for it stay exact."""
        self.method, self.allow_short = method, allow_short
        self.compressed = self.too_short = 0
        self.memory: list[dict] = []
        self.columns = {"method": method.label}

    def fill(self, context: list[int]) -> Filler:
        """Prefill a context once; what comes back makes a cache of it at every call."""
        if not context:
            return self._empty
        prefix = read_prefix(self.model, torch.tensor([context], device=self.device))
        return functools.partial(self._compress, prefix)

    def _empty(self) -> tuple[Cache, None]:
        self._count_short("a context of 1 token leaves nothing to compress")
        return DynamicCache(config=self.model.config), None

    def _compress(self, prefix: Prefix) -> tuple[Cache, str | None]:
        try:
            chosen = choose(self.method, prefix)
            cache = chosen.compress(prefix)
            memory = chosen.memory_columns(cache)
        except ValueError as error:
            self._count_short(f"context of {prefix.num_tokens} tokens: {error}")
            return fork(prefix.cache), None
        self.compressed += 1
        self.memory.append(memory)
        self.columns = describe(self.method, chosen)
        return cache, chosen.implementation

    def _count_short(self, reason: str) -> None:
        """Let a context stay exact, if that is allowed."""
        if not self.allow_short:
            raise ValueError(f"{self.method.label}, {reason}")
        self.too_short += 1

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        Requests with the same context share its prefill.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        contexts = [self._context(context, new) for _, context, new in requests]
        order = sorted(range(len(requests)), key=lambda i: contexts[i])
        for context, group in itertools.groupby(order, key=lambda i: contexts[i]):
            make_cache = self.fill(context[:-1])
            for index in group:
                name, _, new = requests[index]
                tokens = torch.tensor([context[-1:] + new], device=self.device)
                cache, implementation = make_cache()
                with attention(self.model, implementation):
                    logits = self.model(tokens[:, :-1], **cache_argument(cache)).logits[0]
                found[index] = score_continuation(logits, tokens[0, 1:])
                if name is not None:
                    self.cache_hook.add_partial("loglikelihood", name, found[index])
        return found

    def _context(self, context: list[int], new: list[int]) -> list[int]:
        """The end of a context that the model has room for before a continuation."""
        room = self.max_length - len(new) + 1
        if room < 1 or not context:
            raise ValueError(
                f"a continuation of {len(new)} tokens after {len(context)} does not fit into the "
                f"{self.max_length} tokens that the model takes"
            )
        return context[-room:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Not here: every token is its own continuation, so there is no context to compress."""
        raise NotImplementedError(
            "rolling log-likelihood has no context to compress; use 'svdq eval perplexity'"
        )

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        """Generate after a context [1, T]: all but its last token compressed, that one fed."""
        if context.shape[0] != 1 or context.shape[1] < 1:
            raise ValueError(f"expected one context of 1 token or more, got {[*context.shape]}")
        cache, implementation = self.fill(context[0, :-1].tolist())()
        with attention(self.model, implementation):
            return super()._model_generate(
                context, max_length, stop, **cache_argument(cache), **kwargs
            )


def score_continuation(logits: Tensor, tokens: Tensor) -> tuple[float, bool]:
    """Sum of log-likelihoods of tokens [N] under logits [N, vocabulary]; whether each is the top.

    In float64, so that the sum does not depend on the order.
    """
    log_q = logits.double().log_softmax(-1)
    total = log_q.gather(1, tokens[:, None]).sum().item()
    return total, bool((log_q.argmax(-1) == tokens).all())


@functools.cache
def _model_class() -> type:
    """``HFLM`` with compressed contexts, made when it is asked for: lm_eval is optional."""
    import_harness()
    from lm_eval.models.huggingface import HFLM

    return type("CompressedLM", (CompressedContexts, HFLM), {})


def harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method | Matched,
    allow_short: bool = False,
) -> Any:
    """A model for ``lm_eval.simple_evaluate`` whose contexts a method compresses.

    Parameters
    ----------
    allow_short : whether contexts that are too short for the method stay exact (they are counted in
        ``too_short``); otherwise they are an error.
    """
    lm = _model_class()(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=1)
    lm.prepare(method, allow_short)
    return lm


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method | Matched],
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    allow_short: bool = False,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Run tasks of the harness with the full cache and with every method.

    Parameters
    ----------
    tasks : names the harness knows, or finds in ``include_path``.
    num_fewshot, limit : examples in a context, and documents of a task; None for the task's own.
    chat : put contexts into the model's chat template.
    begin : called with each method's label as it begins.

    Returns
    -------
    A row for each method, task and metric: task, metric, value, stderr, compressed and too_short
    (see :class:`CompressedContexts`), and the method's columns.
    """
    lm_eval = import_harness()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    rows = []
    for method in [FullCache(), *methods]:
        begin(method.label)
        lm = harness_model(model, tokenizer, method, allow_short)
        with torch.inference_mode():
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                task_manager=manager,
                log_samples=False,
            )
        shared = {"compressed": lm.compressed, "too_short": lm.too_short}
        if lm.memory:
            shared |= mean_columns(lm.memory)
        for task, metrics in results["results"].items():
            for row in metric_rows(metrics):
                rows.append({"benchmark": "harness", "task": task} | lm.columns | row | shared)
    return rows


def metric_rows(metrics: dict[str, Any]) -> list[dict]:
    """The harness's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}`` as a row a metric."""
    rows = []
    for name, value in metrics.items():
        metric, comma, filtered = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = metrics.get(f"{metric}_stderr,{filtered}")
        label = metric if filtered == "none" else f"{metric}, {filtered}"
        number = float(stderr) if isinstance(stderr, (int, float)) else None
        rows.append({"metric": label, "value": float(value), "stderr": number})
    return rows
