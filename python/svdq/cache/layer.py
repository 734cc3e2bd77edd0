"""One full-attention layer of an :class:`svdq.SVDqCache`: its part in a model, and its checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdq.cache import checks
from svdq.cache.held_layer import HeldLayer
from svdq.hf.new_tokens import NewTokens
from svdq.ops import NO_RULES, LogitRules


class SVDqLayer(HeldLayer):
    """Keys and values of one layer, packed except for the sinks and a sliding window.

    ``update`` only checks the new tokens and hands them on; the ``"svdq"`` attention calls
    :meth:`attend`, which stores them. Parameters and attributes are those of :class:`HeldLayer`.
    """

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

    @torch.compiler.disable
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
        new.stored_with = self.seq_length
        if self.step is not None:
            self.step.end(self.index)
        return out

    @torch.compiler.disable
    def attend_again(
        self,
        query: Tensor,
        new: NewTokens,
        sm_scale: float | None = None,
        *,
        rules: LogitRules = NO_RULES,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to the tokens of this layer by the queries of another, which has none of its own.

        Parameters
        ----------
        query : [B, Hq, L, D], of the last L of the new tokens.
        new : the tokens that :meth:`attend` stored last.
        sm_scale, rules, mask : as for :meth:`attend`.

        Returns
        -------
        out : [B, L, Hq, D].
        """
        if new.stored_with != self.seq_length:
            raise RuntimeError(
                f"layer {self.index}: another layer attends to tokens that are not the latest"
            )
        scale, query = self.head_dim**-0.5 if sm_scale is None else sm_scale, autocast(query)
        length, total = query.shape[2], new.keys.shape[2]
        checks.check_query(self, query, min(length, total))
        with torch.autocast(self.device.type, enabled=False):
            if total < self.seq_length:
                return self.tokens.attend_stored(query, scale, rules)
            mask = None if mask is None else mask[:, :, -length:]
            pads = self.padding
            return self.tokens.attend_exactly(query, new.keys, new.values, scale, rules, pads, mask)

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
            lends=self.lends,
        )
        if is_first:
            self.knows_positions = position_ids is not None and mask is None
        self.padding = [
            old + new if old + new >= self.seq_length else old
            for old, new in zip(self.padding, pads, strict=True)
        ]
        self.seq_length += length
        return out

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
        measures = self.calibrated is None
        if queries is None and self.settings.allocates_values and measures:
            raise ValueError(f"layer {self.index}: to allocate bits of values, queries are needed")
        if energy is None and self.settings.needs_queries and measures:
            raise ValueError(
                f"layer {self.index}: to allocate bits or to apply gain to keys, query_energy is "
                "needed"
            )
        SVDqLayer.update(self, keys, values)
        self.pending = 0
        self.tokens.prefill(keys, values, energy, queries, rules)
        self.padding, self.knows_positions = [0] * self.batch_size, True
        self.seq_length = keys.shape[2]


def autocast(states: Tensor) -> Tensor:
    """What SDPA would make of a tensor under autocast; the tensor itself outside."""
    device = states.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return states
    return states.to(torch.get_autocast_dtype(device))
