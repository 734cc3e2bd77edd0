"""Recall of attention: the share of the true attention mass that a choice of tokens reads.

A context is prefilled exactly, and queries of its last tokens are kept. Each layer's keys are
packed, all at once, as a cache packs them; for every query the scorers then choose among the packed
tokens that lie before its window. The mass of a token is its softmax probability under the exact
keys; sinks and window are always read. Beside the scorers stand choices that know the exact
probabilities: the best tokens, and the best chunks of tokens.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdq.cache.layer import SVDqLayer
from svdq.config.sparsity import DEFAULT_CHANNELS, Sparsity
from svdq.layout import NO_SLOT, PAGE_TOKENS
from svdq.store.attend import select_tokens
from svdq.store.landmarks import CHUNK_TOKENS
from svdq.store.packed import PackedStore
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.prefix import Prefix, read_prefix

BEST_TOKENS, BEST_CHUNKS = "best possible tokens", f"best possible chunks of {CHUNK_TOKENS}"
NONE = "sinks and window alone"


@dataclass(frozen=True)
class RecallTask:
    """The queries that are asked, and the tokens that they read in any case.

    Parameters
    ----------
    start, context_tokens : first token of the context in the text, and its length.
    last, every : every so many of the last so many tokens is a query.
    sink_tokens, residual_length : first and last tokens, seen from a query, that are always read;
        it is the last of them itself.
    """

    start: int = 5000
    context_tokens: int = 6144
    last: int = 1000
    every: int = 30
    sink_tokens: int = 8
    residual_length: int = 64

    def __post_init__(self) -> None:
        if self.every < 1 or self.last < 1:
            raise ValueError(
                f"expected a query at least every token of at least one, got {self.every} and "
                f"{self.last}"
            )
        loose = self.context_tokens % PAGE_TOKENS
        if self.residual_length < max(loose, 1):
            raise ValueError(
                f"residual_length must cover the query itself and the {loose} tokens that fill no "
                f"page, got {self.residual_length}"
            )
        first = self.context_tokens - self.last
        if first < self.sink_tokens + self.residual_length:
            raise ValueError(
                f"a query at token {first} has nothing to choose beyond {self.sink_tokens} sinks "
                f"and a window of {self.residual_length}"
            )

    @property
    def positions(self) -> list[int]:
        """Tokens of the context whose queries are asked."""
        return list(range(self.context_tokens - self.last, self.context_tokens, self.every))

    def context(self, token_ids: Tensor) -> Tensor:
        """Cut the context, [1, T], out of a tokenized text [T]."""
        if self.start < 0 or self.start + self.context_tokens > len(token_ids):
            raise ValueError(
                f"a context of {self.context_tokens} tokens at token {self.start} does not fit "
                f"into the text of {len(token_ids)} tokens"
            )
        return token_ids[None, self.start : self.start + self.context_tokens]


@dataclass(frozen=True)
class Scorer:
    """A scorer of a cache with these settings.

    Parameters
    ----------
    settings : the cache; packs all of a context.
    """

    settings: CacheSettings

    @property
    def name(self) -> str:
        """One of :data:`svdq.config.sparsity.SCORERS`."""
        return self.settings.sparse_scorer

    @property
    def channels(self) -> int:
        """Leading channels of ``"latent"``."""
        return self.settings.sparse_channels

    @property
    def label(self) -> str:
        """The scorer in a few words."""
        if self.name == "landmarks":
            return f"landmarks of {CHUNK_TOKENS} tokens"
        return f"{self.channels} leading channels, {self.settings.rope}-RoPE"

    def scan_bytes(self, store: PackedStore) -> float:
        """Bytes that scoring a token reads, mean over KV heads."""
        heads = store.layout.num_kv_heads
        if self.name == "landmarks":
            slots = max(store.slots)
            return store.landmarks.scan_bytes(slots) / slots / heads
        return store.layout.proxy_page_bytes(self.channels) / PAGE_TOKENS / heads


def make_scorers(
    scorers: Sequence[str], channels: Sequence[int], ropes: Sequence[str], **settings: Any
) -> list[Scorer]:
    """The latent scorer with all channels in all modes, and the others once: they see no codes.

    Parameters
    ----------
    scorers, channels, ropes : what to combine, each at least one.
    settings : what else :class:`svdq_bench.quality.methods.CacheSettings` takes.
    """
    found = []
    for scorer in dict.fromkeys(scorers):
        latent = scorer == "latent"
        for rope in ropes if latent else ropes[:1]:
            for count in channels if latent else (DEFAULT_CHANNELS,):
                own = CacheSettings(
                    v_bits=4,
                    rope=rope,
                    residual_length=0,
                    sparse_budget=1,  # any: it makes the cache hold what its scorer needs
                    sparse_scorer=scorer,
                    sparse_channels=count,
                    **settings,
                )
                found.append(Scorer(own))
    return found


def attention_mass(queries: Tensor, keys: Tensor, positions: Sequence[int]) -> Tensor:
    """Softmax probabilities of causal queries, mean over the query heads of a KV head.

    Parameters
    ----------
    queries : [Hq, N, D], rotated and scaled.
    keys : [H, T, D], rotated.
    positions : of the N queries.

    Returns
    -------
    [N, H, T] float64; zero behind each query.
    """
    num_tokens = keys.shape[1]
    own = queries.double().unflatten(0, (keys.shape[0], -1))
    scores = own @ keys.double().mT[:, None]
    at = torch.tensor(positions, device=keys.device)
    hidden = torch.arange(num_tokens, device=keys.device) > at[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(dim=1).transpose(0, 1)


def best_tokens(mass: Tensor, budget: int) -> Tensor:
    """Mass of the largest ``budget`` tokens of each row, [..., T] -> [...]."""
    return mass.topk(min(budget, mass.shape[-1])).values.sum(-1)


def best_chunks(mass: Tensor, budget: int, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Mass of the best aligned chunks that have ``budget`` tokens together."""
    padded = nn.functional.pad(mass, (0, -mass.shape[-1] % chunk_tokens))
    chunks = padded.unflatten(-1, (-1, chunk_tokens)).sum(-1)
    return best_tokens(chunks, max(budget // chunk_tokens, 1))


def selected_slots(
    queries: Tensor, layer: SVDqLayer, scorer: Scorer, budget: int, task: RecallTask
) -> list[Tensor]:
    """Slots [H, M] that a scorer selects for each of the queries [Hq, N, D], then ``NO_SLOT``.

    ``layer`` is of a cache that has packed the context.
    """
    sparsity = Sparsity(budget, scorer.name, scorer.channels)
    queries = layer.tokens.fit.matching_query(queries[None])
    (store,) = layer.tokens.stores
    found = []
    for index, position in enumerate(task.positions):
        view = first_slots(store, position + 1 - task.residual_length)
        query = queries[:, :, index : index + 1].contiguous()
        found.append(select_tokens(query, view, sparsity, budget, 1.0, task.sink_tokens)[0][0])
    return found


def selected_mass(mass: Tensor, chosen: Sequence[Tensor]) -> Tensor:
    """Mass [N, H] of the slots chosen for each query, of the masses [N, H, T]."""
    found = []
    for own, slots in zip(mass, chosen, strict=True):
        there = slots < NO_SLOT
        found.append((own.gather(1, slots.where(there, 0).long()) * there).sum(-1))
    return torch.stack(found)


def groups_per_token(chosen: Sequence[Tensor]) -> float:
    """Aligned groups of 8 neighbours that the chosen slots [H, M] lie in, per slot; they ascend.

    Near 1 where slots lie apart, 1/8 where whole groups are chosen.
    """
    slots = torch.stack(list(chosen))
    there = slots < NO_SLOT
    group = slots // CHUNK_TOKENS
    begins = there.clone()
    begins[..., 1:] &= group[..., 1:] != group[..., :-1]
    return int(begins.sum()) / int(there.sum())


def first_slots(store: PackedStore, count: int) -> PackedStore:
    """A store as it was with ``count`` tokens of its one sequence, sharing its pages."""
    view = copy.copy(store)
    view.pool = copy.copy(store.pool)
    view.pool.slots = [count]
    view.pool.cache_seqlens = torch.tensor([count], dtype=torch.int32, device=store.device)
    return view


def evaluate_recall(
    model: PreTrainedModel,
    token_ids: Tensor,
    scorers: Sequence[Scorer],
    budgets: Sequence[int | float],
    task: RecallTask,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Share of the true attention mass that is read, by choice and budget.

    Parameters
    ----------
    model : a causal language model with its default attention.
    token_ids : [T] int64, the whole text.
    scorers : to compare with what is possible.
    budgets : tokens of a KV head to choose, or their share of the context.
    begin : called with the name of each of the ``2 + len(scorers)`` steps as it begins.

    Returns
    -------
    Rows of ``"sparsity"`` for every choice and budget: method, budget, tokens (what that means
    here), recall (mean over queries, KV heads with their query heads, and layers), of scorers
    scan_bytes (bytes that scoring one token of a KV head reads) and groups_per_token (see
    :func:`groups_per_token`), and what describes the run.
    """
    tokens = {budget: _tokens(budget, task) for budget in budgets}
    begin("prefill")
    prefix = read_prefix(model, task.context(token_ids), task.positions)
    layers = list(_layer_masses(prefix, task))
    begin("best choices")
    base = statistics.fmean(float(always.mean()) for _, _, always in layers)
    rows = [
        _row(name, budget, count, base + _mean(best(mass, count) for _, mass, _ in layers))
        for name, best in ((BEST_TOKENS, best_tokens), (BEST_CHUNKS, best_chunks))
        for budget, count in tokens.items()
    ]
    for scorer in scorers:
        begin(scorer.label)
        cache = scorer.settings.compress(prefix)
        scorer.settings.bits(cache)  # says so where nothing was packed
        scan = statistics.fmean(
            scorer.scan_bytes(cache.layers[index].tokens.packed) for index, _, _ in layers
        )
        for budget, count in tokens.items():
            chosen = [
                selected_slots(prefix.queries[index], cache.layers[index], scorer, count, task)
                for index, _, _ in layers
            ]
            found = (
                selected_mass(mass, own) for (_, mass, _), own in zip(layers, chosen, strict=True)
            )
            row = _row(scorer.label, budget, count, base + _mean(found))
            row["groups_per_token"] = statistics.fmean(map(groups_per_token, chosen))
            settings = {"scorer": scorer.name, "rope": scorer.settings.rope}
            settings |= {"preset": scorer.settings.keys, "scan_bytes": scan}
            if scorer.name == "latent":
                settings["channels"] = scorer.channels
            rows.append(row | settings)
    rows += [_row(NONE, budget, 0, base) for budget in tokens]
    shared = {
        "context_tokens": task.context_tokens,
        "start": task.start,
        "queries": len(task.positions),
        "sink_tokens": task.sink_tokens,
        "residual_length": task.residual_length,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return [row | shared for row in rows]


def _layer_masses(prefix: Prefix, task: RecallTask) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Layer, mass [N, H, T] of the tokens to choose from, and mass [N, H] that is always read."""
    for index in prefix.full_layers:
        keys = prefix.cache.layers[index].keys[0]
        mass = attention_mass(prefix.queries[index], keys, task.positions)
        place = torch.arange(keys.shape[1], device=keys.device)
        window = torch.tensor(task.positions, device=keys.device) - task.residual_length
        always = (place < task.sink_tokens) | (place > window[:, None])
        free = mass.masked_fill(always[:, None], 0)
        yield index, free, (mass - free).sum(-1)


def _tokens(budget: int | float, task: RecallTask) -> int:
    return Sparsity(budget, "latent", DEFAULT_CHANNELS).tokens(task.context_tokens)


def _mean(masses: Iterator[Tensor]) -> float:
    return statistics.fmean(float(mass.mean()) for mass in masses)


def _row(method: str, budget: int | float, tokens: int, recall: float) -> dict:
    return {
        "benchmark": "sparsity",
        "method": method,
        "budget": budget,
        "tokens": tokens,
        "recall": recall,
    }
