"""The tokens of one layer of a cache, and attention over them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from svdq import ops
from svdq.config.settings import Settings
from svdq.config.sparsity import Sparsity
from svdq.fit.calibration import CalibratedLayer
from svdq.fit.layer_fit import Allocate
from svdq.fit.value_loss import sample_positions
from svdq.layout import PAGE_TOKENS
from svdq.ops import NO_RULES, LogitRules
from svdq.ops.tensors import int32_tensor
from svdq.store.attend import attend_stores
from svdq.store.dense import causal_attention_with_lse, ragged_attention
from svdq.store.token_store import TokenStore

# On a CPU, longer chunks attend among themselves with PyTorch's kernel. On a GPU the attend stage
# has tiles for them.
FUSED_QUERIES = PAGE_TOKENS


class LayerStore(TokenStore):
    """The tokens of one layer, which attend to those before them as they are stored.

    Parameters
    ----------
    settings, shape, dtype, device, frequencies, allocate, calibrated : as for
        :class:`TokenStore`.
    sparsity : how steps of one token choose the packed tokens that they attend to; None for all.

    Attributes
    ----------
    attended : packed tokens of each store that the last step attended to, as long as these stores
        stand; else None.
    """

    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        frequencies: Callable[[int], Tensor] | None = None,
        allocate: Allocate | None = None,
        calibrated: CalibratedLayer | None = None,
        sparsity: Sparsity | None = None,
    ) -> None:
        super().__init__(
            settings,
            shape,
            dtype,
            device,
            frequencies=frequencies,
            allocate=allocate,
            calibrated=calibrated,
        )
        self.sparsity = sparsity
        self.attended: list[int] | None = None

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        sm_scale: float,
        *,
        rules: LogitRules = NO_RULES,
        padding: list[int] | None = None,
        first_position: list[int] | None = None,
    ) -> Tensor:
        """Attend to all stored tokens and to new ones; store the new, pack what leaves the window.

        Parameters
        ----------
        query : [B, Hq, L, D], rotated.
        keys, values : [B, H, L, D], the new tokens.
        sm_scale : softmax scale.
        rules : softcap, learned sinks and sliding window of the model.
        padding : left padding of each sequence, given with the first tokens alone.
        first_position : position of each sequence's first token, given with the first tokens alone.

        Returns
        -------
        out : [B, L, Hq, D]; zeros at padding.

        Raises
        ------
        ValueError
            For keys or values that are not finite. All tokens are as they were then, but a store
            whose first tokens fail has to be dropped.
        NotImplementedError
            For a softcap or a sliding window where ``sparsity`` chooses tokens.
        """
        self._check_rules(rules)
        if padding is not None:
            return self._attend_first(query, keys, values, sm_scale, rules, padding, first_position)
        if self.device.type == "cpu" and keys.shape[2] > FUSED_QUERIES and self.any_packed:
            return self._attend_chunk(query, keys, values, sm_scale, rules)
        return self._attend_step(query, keys, values, sm_scale, rules)

    def prefill(
        self,
        keys: Tensor,
        values: Tensor,
        energy: Tensor | None,
        queries: Tensor | None = None,
        rules: LogitRules = NO_RULES,
    ) -> None:
        """Store first tokens that were attended elsewhere, [B, H, T, D] at positions 0 .. T - 1.

        ``energy`` is that of the scaled queries, [H, D], and ``queries`` those at sample_positions,
        [Hq, N, D], which attended by ``rules``; needed where ``settings`` say so.
        """
        if self.fit.value_loss is not None:
            positions = sample_positions(keys.shape[2])
            for b in range(self.shape[0]):
                self.fit.value_loss.add(b, queries, positions, keys[b], values[b], rules)
        if self.fit.energy is not None:
            self.fit.energy.set(energy, keys.shape[2])
        none = [0] * self.shape[0]
        self._store_first(keys, values, none, none)

    def domain_drift(self) -> list[float]:
        """Error of each sequence's keys under the calibration over what that saw.

        Of its first keys where that was measured (``refit_drift``), else of the latest that are
        packed under the calibration; NaN where none are. For layers with a calibration alone.
        """
        first = self.stores[0]
        pairs = zip(first.domain, first.drift.ratio().tolist(), strict=True)
        return [ratio if math.isnan(known) else known for known, ratio in pairs]

    def crop(self, length: int) -> None:
        """Remove the last tokens of every sequence; one left with sinks alone loses its basis."""
        self.attended = None
        super().crop(length)

    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        self.attended = None
        super().select(indices)

    def _attend_first(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        sm_scale: float,
        rules: LogitRules,
        padding: list[int],
        first_position: list[int],
    ) -> Tensor:
        """The first tokens attend exactly; then all except sinks and window are packed."""
        spans = [(pad, keys.shape[2]) for pad in padding]
        # PyTorch's kernel is slower by some per cent where rows lie apart. The copies are gone
        # before anything is packed.
        contiguous = keys.contiguous(), values.contiguous()
        out = ragged_attention(query, *contiguous, sm_scale, spans, rules)
        del contiguous
        self._note_queries(query, sm_scale, padding)
        self._note_values(query, keys, values, sm_scale, padding, rules)
        self._store_first(keys, values, padding, first_position)
        return out

    def _attend_step(
        self, query: Tensor, keys: Tensor, values: Tensor, sm_scale: float, rules: LogitRules
    ) -> Tensor:
        """A few more tokens join the window first and are attended there."""
        self._note_queries(query, sm_scale, [0] * self.shape[0])
        self._append(keys, values)
        self._note_window(query, sm_scale, rules)
        query = self.fit.matching_query(query)
        try:
            if self.any_packed:
                out, _ = self._attend_packed(query, sm_scale, rules, causal=True)
                out = out.transpose(1, 2)
            else:
                window, spans = self.window, [(0, count) for count in self.window.count]
                out = ragged_attention(query, window.keys, window.values, sm_scale, spans, rules)
        except BaseException:
            self._retract(keys.shape[2])
            raise
        self._pack_window()
        return out

    def _attend_chunk(
        self, query: Tensor, keys: Tensor, values: Tensor, sm_scale: float, rules: LogitRules
    ) -> Tensor:
        """Many more tokens attend among themselves and, apart from that, to all before them."""
        # A chunk is stored piece by piece, so all of it is checked before the first.
        for name, states in (("keys", keys), ("values", values)):
            if not torch.stack(torch.aminmax(states)).isfinite().all():  # a NaN is an extreme, too
                raise ValueError(f"{name} must be finite, got NaN or inf")
        self._note_queries(query, sm_scale, [0] * self.shape[0])
        matching = self.fit.matching_query(query)
        before = self._attend_packed(matching, sm_scale, rules, causal=False)
        among = causal_attention_with_lse(query, keys, values, sm_scale, rules.without_sinks())
        out, _ = ops.merge(*before, *among)
        self._append_chunk(keys, values)
        return out.transpose(1, 2)

    def _attend_packed(
        self, query: Tensor, sm_scale: float, rules: LogitRules, causal: bool
    ) -> tuple[Tensor, Tensor]:
        position = None
        if rules.window_size:  # the queries' own tokens are stored already where the call is causal
            own = query.shape[2] if causal else 0
            first = [start + self.count(b) - own for b, start in enumerate(self.position)]
            position = int32_tensor(first, self.device)
        out, lse, self.attended = attend_stores(
            query,
            self.stores,
            self.window,
            sm_scale,
            sink_tokens=self.settings.sink_tokens,
            causal=causal,
            sparsity=self.sparsity if query.shape[2] == 1 else None,
            rules=rules,
            query_position=position,
        )
        return out, lse

    def _check_rules(self, rules: LogitRules) -> None:
        """Tokens are selected by scores that know neither a softcap nor a sliding window."""
        if self.sparsity is None or not (rules.softcap or rules.window_size):
            return
        raise NotImplementedError(
            "a cache that selects tokens (sparse_budget) supports learned sinks (s_aux), but "
            f"neither softcap nor sliding_window, got softcap={rules.softcap} and "
            f"sliding_window={rules.window_size}; without sparse_budget it supports all three"
        )

    def _note_values(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        sm_scale: float,
        padding: list[int],
        rules: LogitRules,
    ) -> None:
        """Measure what values lose by some queries of the first tokens, where it matters."""
        if self.fit.value_loss is None:
            return
        for b, pad in enumerate(padding):
            positions = sample_positions(query.shape[2] - pad)
            some = query[b, :, [pad + i for i in positions]] * sm_scale
            own = keys[b, :, pad:], values[b, :, pad:]
            self.fit.value_loss.add(b, some, positions, *own, rules)

    def _note_window(self, query: Tensor, sm_scale: float, rules: LogitRules) -> None:
        """The same by the last query of tokens that join a window of which nothing is packed."""
        if self.fit.value_loss is None or self.packed is not None:
            return
        window = self.window
        for b, count in enumerate(window.count):
            keys, values = window.keys[b, :, :count], window.values[b, :, :count]
            latest = query[b, :, -1:] * sm_scale
            self.fit.value_loss.add(b, latest, [count - 1], keys, values, rules)

    def _note_queries(self, query: Tensor, sm_scale: float, padding: list[int]) -> None:
        """Take the energy of queries, [B, Hq, L, D], while it may still matter."""
        if self.fit.energy is not None and not (self.packed and all(self.packed.fitted)):
            self.fit.energy.add(query, sm_scale, padding)
