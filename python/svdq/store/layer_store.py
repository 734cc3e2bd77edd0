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
from svdq.store.checkpoint import checkpoint
from svdq.store.dense import causal_attention_with_lse, masked_attention, ragged_attention
from svdq.store.token_store import TokenStore

LARGEST_HALF = torch.finfo(torch.float16).max
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
        mask: Tensor | None = None,
        lends: bool = False,
    ) -> Tensor:
        """Attend to all stored tokens and to new ones; store the new, pack what leaves the window.

        Parameters
        ----------
        query : [B, Hq, L, D], rotated.
        keys, values : [B, H, L, D], the new tokens.
        sm_scale : softmax scale.
        rules : softcap, learned sinks and sliding window of the model.
        padding : left padding of each sequence among the new tokens, by default none; of one that
            has tokens, 0.
        first_position : position of each sequence's first new token, by default 0; read where it is
            its first.
        mask : [B or 1, 1 or Hq, L, L] bool or float, instead of causality; with the first tokens
            alone.
        lends : whether :meth:`attend_stored` will be called for other layers' queries: tokens that
            leave the window are packed with the next call then.

        Returns
        -------
        out : [B, L, Hq, D]; zeros at padding.

        Raises
        ------
        ValueError
            For keys or values that are not finite; what to do then :meth:`checkpoint` knows.
        NotImplementedError
            For a softcap or a sliding window where ``sparsity`` chooses tokens.
        """
        self._check_rules(rules)
        self._check_values(values)
        padding = [0] * self.shape[0] if padding is None else padding
        first_position = [0] * self.shape[0] if first_position is None else first_position
        if not self.begun:
            self.position = first_position
            return self._attend_first(query, keys, values, sm_scale, rules, padding, mask)
        if lends:
            self._pack_window()  # what the last call has left
        is_long = self.device.type == "cpu" and keys.shape[2] > FUSED_QUERIES and not lends
        if is_long and self.any_packed and not any(padding):
            return self._attend_chunk(query, keys, values, sm_scale, rules)
        self._begin_sequences(first_position)
        self._note_queries(query, sm_scale, padding)
        self._append(keys, values, padding)
        self._note_window(query, sm_scale, rules)
        out = self.attend_stored(query, sm_scale, rules)
        for b, pad in enumerate(padding):
            if pad:
                out[b, :pad] = 0
        if not lends:
            self._pack_window()
        return out

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
        self._store_first(keys, values, [0] * self.shape[0])

    def _begin_sequences(self, first_position: list[int]) -> None:
        """Take the positions of sequences that have no token yet."""
        empty = [b for b in range(self.shape[0]) if not self.count(b)]
        if not empty:
            return
        self.position = [
            first_position[b] if b in empty else old for b, old in enumerate(self.position)
        ]
        if self.packed is not None:
            self.packed.set_first_position(self.position)

    def checkpoint(self, new_tokens: int) -> Callable[[], None]:
        """What to call to forget all that happens from here on to so many new tokens."""
        attended, restore_tokens = self.attended, checkpoint(self, new_tokens)

        def restore() -> None:
            restore_tokens()
            self.attended = attended

        return restore

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
        mask: Tensor | None,
    ) -> Tensor:
        """The first tokens attend exactly; then all except sinks and window are packed."""
        # PyTorch's kernel is slower by some per cent where rows lie apart. The copies are gone
        # before anything is packed.
        contiguous = keys.contiguous(), values.contiguous()
        out = self.attend_exactly(query, *contiguous, sm_scale, rules, padding, mask)
        del contiguous
        self._note_queries(query, sm_scale, padding)
        self._note_values(query, keys, values, sm_scale, padding, rules)
        self._store_first(keys, values, padding)
        return out

    def attend_stored(self, query: Tensor, sm_scale: float, rules: LogitRules) -> Tensor:
        """Attend by the queries [B, Hq, L, D] of the last L tokens, all stored: [B, L, Hq, D]."""
        query = self.fit.matching_query(query)
        if self.any_packed:
            out, _ = self._attend_packed(query, sm_scale, rules, causal=True)
            return out.transpose(1, 2)
        window, spans = self.window, [(0, count) for count in self.window.count]
        return ragged_attention(query, window.keys, window.values, sm_scale, spans, rules)

    def attend_exactly(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        sm_scale: float,
        rules: LogitRules,
        padding: list[int],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to first tokens [B, H, T, D] by the queries [B, Hq, L, D] of the last of them.

        ``mask`` [B or 1, 1 or Hq, L, T] stands for causality; the result is [B, L, Hq, D].
        """
        if mask is not None:
            return masked_attention(query, keys, values, sm_scale, mask, padding, rules)
        spans = [(pad, keys.shape[2]) for pad in padding]
        return ragged_attention(query, keys, values, sm_scale, spans, rules)

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

    def _check_values(self, values: Tensor) -> None:
        """Refuse values that cannot be packed once they leave the window, as no step could then.

        A GPU's are not read: its kernels make NaN of them.
        """
        if not self.settings.packs_values or self.device.type != "cpu":
            return
        largest = torch.stack(torch.aminmax(values)).abs().max().item()
        if LARGEST_HALF < largest < math.inf:
            raise ValueError(
                f"values must be at most {LARGEST_HALF:.0f} in magnitude to be packed, got "
                f"{largest:.3g}; v_bits='exact' takes them"
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
            if pad == query.shape[2]:
                continue
            positions = sample_positions(query.shape[2] - pad)
            some = query[b, :, [pad + i for i in positions]] * sm_scale
            own = keys[b, :, pad:], values[b, :, pad:]
            self.fit.value_loss.add(b, some, positions, *own, rules)

    def _note_window(self, query: Tensor, sm_scale: float, rules: LogitRules) -> None:
        """The same by the last query of tokens that join a window of which nothing is packed."""
        if self.fit.value_loss is None or self.packed is not None:
            return
        window = self.window
        for b, count in ((b, count) for b, count in enumerate(window.count) if count):
            keys, values = window.keys[b, :, :count], window.values[b, :, :count]
            latest = query[b, :, -1:] * sm_scale
            self.fit.value_loss.add(b, latest, [count - 1], keys, values, rules)

    def _note_queries(self, query: Tensor, sm_scale: float, padding: list[int]) -> None:
        """Take the energy of queries, [B, Hq, L, D], while it may still matter."""
        if self.fit.energy is not None and not (self.packed and all(self.packed.fitted)):
            self.fit.energy.add(query, sm_scale, padding)
