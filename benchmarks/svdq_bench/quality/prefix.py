"""A context read once, exactly, whatever the number of caches that then go on from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from svdq import cache_argument, sample_positions
from svdq.hf.attention import svdq_attention
from svdq.hf.logit_rules import logit_rules
from svdq.ops import LogitRules
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.models import check_length

RECORDING = "svdq-recording"


@dataclass
class _Recording:
    """Notes of queries by layer; see :class:`Prefix`."""

    positions: list[int]
    energies: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    samples: dict[int, Tensor] = field(default_factory=dict)
    rules: dict[int, LogitRules] = field(default_factory=dict)


_recording: ContextVar[_Recording | None] = ContextVar("recording of queries", default=None)


@dataclass(frozen=True)
class Prefix:
    """Cache and logits of a context, with the query energies that some methods weigh keys by.

    Parameters
    ----------
    config : of the model.
    cache : exact keys and values of one sequence; methods read it and never change it.
    query_energy : per layer [H, D] float32, the mean of the squared queries, rotated and times the
        softmax scale, over the tokens and over the query heads of a KV head; None for layers that
        are not full attention.
    first : [1, vocabulary] logits of the token after the context.
    queries : by layer, [Hq, N, D], queries of the positions that were asked for, rotated and times
        the softmax scale.
    samples : the same of the positions that :func:`svdq.sample_positions` names.
    rules : by layer, what the model does to its logits.
    """

    config: PretrainedConfig
    cache: DynamicCache
    query_energy: list[Tensor | None]
    first: Tensor
    queries: dict[int, Tensor] = field(default_factory=dict)
    samples: dict[int, Tensor] = field(default_factory=dict)
    rules: dict[int, LogitRules] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the context."""
        return self.cache.get_seq_length(self.full_layers[0])

    @property
    def full_layers(self) -> list[int]:
        """Indices of the layers whose keys methods compress: those that attend to all tokens."""
        return [i for i, energy in enumerate(self.query_energy) if energy is not None]

    @property
    def key_shapes(self) -> list[tuple[int, int, int]]:
        """KV heads, tokens and head_dim of the full-attention layers."""
        return [tuple(self.cache.layers[i].keys.shape[1:]) for i in self.full_layers]

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the exact cache."""
        return self.cache.layers[self.full_layers[0]].keys.itemsize


class Method(Protocol):
    """A way to hold a context, under test.

    Attributes
    ----------
    label : a few words that name it in tables.
    implementation : attention implementation under which the model goes on from the cache; None for
        the model's own.
    """

    @property
    def label(self) -> str: ...

    @property
    def implementation(self) -> str | None: ...

    def compress(self, prefix: Prefix) -> Cache:
        """A new cache of the context for the model to go on from; the prefix stays as it is."""

    def columns(self) -> dict:
        """Columns of the settings in a row of results; at least ``method``, the label."""

    def memory_columns(self, cache: Cache) -> dict:
        """Memory of what :meth:`compress` returned, before the model went on.

        Returns
        -------
        k_bits : bits of the codes alone per key number that is coded.
        all_in_bits : everything stored for keys per key number of the full-attention layers.
        cache_bytes : the whole cache.
        cache_ratio : bytes of the full cache over those.
        """


@torch.inference_mode()
def read_prefix(
    model: PreTrainedModel, context: Tensor, query_positions: Sequence[int] = ()
) -> Prefix:
    """Prefill a context exactly, in one forward pass.

    Parameters
    ----------
    context : [1, T] int64.
    query_positions : tokens of it whose queries are kept.

    Raises
    ------
    ValueError
        For a context of another shape or longer than the model takes, or a model without
        full-attention layers.
    """
    if context.ndim != 2 or context.shape[0] != 1 or context.shape[1] < 1:
        raise ValueError(f"expected a context [1, T] of at least 1 token, got {[*context.shape]}")
    check_length(model, context.shape[1])
    cache = DynamicCache(config=model.config)
    with _record(query_positions) as record, attention(model, RECORDING):
        first = model(context, logits_to_keep=1, **cache_argument(cache)).logits[0, -1:]
    query_energy = [
        None if getattr(layer, "is_sliding", False) else record.energies.get(index)
        for index, layer in enumerate(cache.layers)
    ]
    if all(energy is None for energy in query_energy):
        raise ValueError(f"{model.config.model_type!r} has no full-attention layer to compress")
    return Prefix(
        model.config, cache, query_energy, first, record.queries, record.samples, record.rules
    )


def fork(cache: DynamicCache, keys: dict[int, Tensor] | None = None) -> DynamicCache:
    """A cache that goes on from another one without changing it.

    Layers of a ``DynamicCache`` grow by concatenation, so both may hold the same tensors.

    Parameters
    ----------
    keys : by layer, [1, H, T, D], what stands in the new cache instead.
    """
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    for index, tensor in (keys or {}).items():
        if tensor.shape != forked.layers[index].keys.shape:
            raise ValueError(
                f"layer {index} has keys {[*forked.layers[index].keys.shape]}, got "
                f"{[*tensor.shape]}"
            )
        forked.layers[index].keys = tensor
    return forked


@contextmanager
def _record(positions: Sequence[int]) -> Iterator[_Recording]:
    """Note queries by layer while a model runs under ``RECORDING``."""
    record = _Recording(list(positions))
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)


def _recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Exact attention that notes what is asked of the queries [1, Hq, T, D] it is given."""
    record = _recording.get()
    if record is None:
        raise RuntimeError(f"{RECORDING!r} attention is for read_prefix alone")
    heads, dim = key.shape[1], query.shape[-1]
    scaling = kwargs.get("scaling") or dim**-0.5
    energy = (query[0].float() * scaling).square().mean(dim=1)
    if record.positions:
        record.queries[module.layer_idx] = query[0, :, record.positions] * scaling
    some = sample_positions(query.shape[2])
    record.samples[module.layer_idx] = query[0, :, some] * scaling
    record.rules[module.layer_idx] = logit_rules(query, kwargs)
    record.energies[module.layer_idx] = energy.view(heads, -1, dim).mean(dim=1)
    return svdq_attention(module, query, key, value, *args, **kwargs)


AttentionInterface.register(RECORDING, _recording_attention)
AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
