"""One full-attention layer of an :class:`svdq.SVDqCache`: its part in a model, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from svdq.cache import checks
from svdq.cache.step import Step, Undo
from svdq.config.settings import Settings
from svdq.fit.layer_fit import Allocate
from svdq.hf.new_tokens import NewTokens
from svdq.ops import NO_RULES, LogitRules
from svdq.store.layer_store import LayerStore


class SVDqLayer(CacheLayerMixin):
    """Keys and values of one layer, packed except for the sinks and a sliding window.

    ``update`` only checks the new tokens and hands them on; the ``"svdq"`` attention calls
    :meth:`attend`, which stores them.

    Parameters
    ----------
    index : index of the layer in its model, for messages.
    settings : how to compress.
    frequencies : maps the largest position in use to the inverse frequencies of the layer; None
        where its keys are packed as they come (``rope="post"``).
    allocate : asks for the layer's bands, see :class:`svdq.fit.layer_fit.LayerFit`; None where a
        schedule says them.

    Attributes
    ----------
    step : set by the cache; knows the layers that the model's current call has reached.
    num_layers : set by the cache; of the model that it was made for.
    """

    is_compileable = False
    is_static = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        index: int,
        settings: Settings,
        frequencies: Callable[[int], Tensor] | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.settings, self.sparsity = settings, settings.sparsity(index)
        self.frequencies = frequencies
        self.allocate = allocate
        self.step: Step | None = None
        self.num_layers: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and give their memory back."""
        self.is_initialized = False
        self.seq_length = 0  # tokens per sequence including left padding, as transformers counts
        self.pending = 0  # tokens handed out by `update` that the attention has not stored yet
        self.padding: list[int] = []
        self.knows_positions = False
        self.tokens: LayerStore | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Take shapes and dtype from the first keys, ``[B, H, T, D]``."""
        batch, heads, _, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_kv_heads, self.head_dim = batch, heads, dim
        self.padding = [0] * batch
        self.tokens = LayerStore(
            self.settings,
            (batch, heads, dim),
            self.dtype,
            self.device,
            frequencies=self.frequencies,
            allocate=self.allocate,
            sparsity=self.sparsity,
        )
        self.is_initialized = True

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[NewTokens, NewTokens]:
        """Check new keys and values, ``[B, H, L, D]``, and hand them to the ``"svdq"`` attention.

        Under autocast they take its dtype, as SDPA would cast them.

        Raises
        ------
        ValueError
            For shapes or dtypes that do not fit each other or the tokens before; nothing is stored
            then.
        RuntimeError
            If tokens of the last call were never attended, so that they would be lost.
        """
        if self.pending:
            raise RuntimeError(
                f"layer {self.index}: {self.pending} tokens given to update() were never attended; "
                "call reset()"
            )
        states = [autocast(x) for x in (key_states, value_states)]
        checks.check_states(self, *states)
        if self.seq_length == 0:
            self.lazy_initialization(states[0])
        checks.check_continues(self, states[0])
        new = NewTokens(self, *(x if x.stride(3) == 1 else x.contiguous() for x in states))
        self.pending = key_states.shape[2]
        return new, new

    def attend(
        self,
        query: Tensor,
        new: NewTokens,
        sm_scale: float | None = None,
        *,
        rules: LogitRules = NO_RULES,
        padding: list[int] | None = None,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend over all cached and new tokens; store the new, pack what has left the window.

        Parameters
        ----------
        query : [B, Hq, L, D], rotated, in the dtype of the keys.
        new : of :meth:`update` for the same L tokens.
        sm_scale : softmax scale, ``D ** -0.5`` by default.
        rules : softcap, learned sinks and sliding window of the model.
        padding : left padding of each sequence, or of one row for all; None where the model has no
            mask.
        position_ids : [B or 1, L] positions of the new tokens; None where the model does not pass
            them on.
        mask : [B or 1, 1 or Hq, L, L] bool or float, which the first tokens attend by instead of
            causally.

        Returns
        -------
        out : [B, L, Hq, D]; zeros at padding.

        Raises
        ------
        ValueError
            For a query that does not fit, keys that are not finite, padding that changed, positions
            with gaps or a ``mask`` after the first tokens. The cache is as it was, in all layers.
        NotImplementedError
            For a softcap or a sliding window where the cache selects tokens (sparsity); likewise.
        """
        try:
            query = autocast(query)
            with torch.autocast(self.device.type, enabled=False):
                out = self._attend(query, new, sm_scale, rules, padding, position_ids, mask)
        except BaseException:
            self.take_back()
            raise
        self.pending = 0
        if self.step is not None:
            self.step.end(self.index)
        return out

    def _attend(
        self,
        query: Tensor,
        new: NewTokens,
        sm_scale: float | None,
        rules: LogitRules,
        padding: list[int] | None,
        position_ids: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        length, is_first = new.keys.shape[2], self.seq_length == 0
        checks.check_query(self, query, length)
        if mask is not None and self.tokens.begun:
            raise ValueError(
                f"layer {self.index}: a mask that is not causal with left padding is supported for "
                f"the first tokens alone, the cache holds {self.seq_length}. For another prompt "
                "call reset() or make a new cache"
            )
        pads = checks.new_padding(self, padding, length)
        first_position = checks.first_positions(self, position_ids, pads, mask is None)
        out = self.tokens.attend(
            query,
            new.keys,
            new.values,
            self.head_dim**-0.5 if sm_scale is None else sm_scale,
            rules=rules,
            padding=pads,
            first_position=first_position,
            mask=mask,
        )
        if is_first:
            self.knows_positions = position_ids is not None and mask is None
        self.padding = [
            old + new if old + new >= self.seq_length else old
            for old, new in zip(self.padding, pads, strict=True)
        ]
        self.seq_length += length
        return out

    def check_model(self, num_layers: int | None) -> None:
        """Refuse tokens of a model with another number of layers; None where it is not known."""
        if None not in (num_layers, self.num_layers) and num_layers != self.num_layers:
            raise ValueError(
                f"the cache was made for a model of {self.num_layers} layers, this one has "
                f"{num_layers}"
            )

    def take_back(self) -> None:
        """Forget the tokens of the model's current call, in all layers of the cache."""
        self.pending = 0
        if self.step is not None:
            self.step.take_back()

    def checkpoint(self, new_tokens: int) -> Undo:
        """What to call to forget all that happens from here on to so many new tokens."""
        if self.seq_length == 0:
            return self.reset
        known = {name: getattr(self, name) for name in ("seq_length", "padding", "knows_positions")}
        restore = self.tokens.checkpoint(new_tokens)

        def undo() -> None:
            vars(self).update(known, pending=0)
            restore()

        return undo

    def prefill_from(
        self,
        keys: Tensor,
        values: Tensor,
        energy: Tensor | None,
        queries: Tensor | None = None,
        rules: LogitRules = NO_RULES,
    ) -> None:
        """Take tokens that were attended elsewhere, [B, H, T, D] at positions 0 .. T - 1.

        ``energy`` is that of the scaled queries, [H, D], and ``queries`` those at sample_positions,
        [Hq, N, D], which attended by ``rules``; needed where ``settings`` say so.
        """
        if queries is None and self.settings.allocates_values:
            raise ValueError(f"layer {self.index}: to allocate bits of values, queries are needed")
        if energy is None and self.settings.needs_queries:
            raise ValueError(
                f"layer {self.index}: to allocate bits or to apply gain to keys, query_energy is "
                "needed"
            )
        SVDqLayer.update(self, keys, values)
        self.pending = 0
        self.tokens.prefill(keys, values, energy, queries, rules)
        self.padding, self.knows_positions = [0] * self.batch_size, True
        self.seq_length = keys.shape[2]

    # Further methods of transformers' layers

    def get_seq_length(self) -> int:
        """Tokens per sequence, left padding included."""
        return self.seq_length + self.pending

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of the mask; ``query`` is a length or, in transformers 4, positions."""
        query_length = query if isinstance(query, int) else query.shape[0]
        return self.seq_length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum, which transformers writes as -1."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep."""
        length = -tokens_to_remove
        if tokens_to_remove > 0:
            length = max(self.seq_length - tokens_to_remove, 0)
        if length >= self.seq_length:
            self.reset()
        elif length:
            self.tokens.crop(length)
            self.seq_length -= length
            self.padding = [min(pad, self.seq_length) for pad in self.padding]
            self.tokens.compact()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues the old sequence ``beam_idx[i]``; their pages stay shared."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; copies share their pages."""
        if self.seq_length:
            self._select([b for b in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor | Sequence[int] | slice) -> None:
        """Keep the sequences that ``indices`` names, in its order; a mask and a slice do, too."""
        if self.seq_length:
            device = indices.device if isinstance(indices, Tensor) else None
            self._select(torch.arange(self.batch_size, device=device)[indices].tolist())
            self.tokens.compact()

    def _select(self, indices: list[int]) -> None:
        if self.seq_length and indices != list(range(self.batch_size)):
            self.tokens.select(indices)
            self.padding = [self.padding[i] for i in indices]
            self.batch_size = len(indices)

    def offload(self) -> None:
        """Nothing to do: the cache stays where its keys are."""

    def prefetch(self) -> None:
        """Nothing to do: the cache stays where its keys are."""


def autocast(states: Tensor) -> Tensor:
    """What SDPA would make of a tensor under autocast; the tensor itself outside."""
    device = states.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return states
    return states.to(torch.get_autocast_dtype(device))
