"""One full-attention layer of an :class:`svdq.SVDqCache`: its part in a model, and its checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from svdq.config.settings import Settings
from svdq.fit.calibration import CalibratedLayer
from svdq.fit.layer_fit import Allocate
from svdq.hf.new_tokens import NewTokens
from svdq.hf.positions import read_positions
from svdq.ops import NO_RULES, LogitRules
from svdq.store.layer_store import LayerStore

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """

    is_compileable = False
    is_static = False
    is_croppable = True
    is_sliding = False
    calibrated: CalibratedLayer | None = None  # set by a cache with a calibration

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
        if key_states.device.type not in DEVICES:
            raise NotImplementedError(
                f"SVDqCache runs on {' and '.join(DEVICES)} tensors, got {key_states.device}"
            )
        if key_states.dtype not in DTYPES:
            raise ValueError(
                f"layer {self.index}: keys must be one of {DTYPES}, got {key_states.dtype}"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_kv_heads, self.head_dim = batch, heads, dim
        calibrated = None
        if self.calibrated is not None:
            self.calibrated.check_shape(self.index, heads, dim)
            calibrated = self.calibrated.on(self.device)
        self.padding = [0] * batch
        self.tokens = LayerStore(
            self.settings,
            (batch, heads, dim),
            self.dtype,
            self.device,
            frequencies=self.frequencies,
            allocate=self.allocate,
            calibrated=calibrated,
            sparsity=self.sparsity,
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[NewTokens, NewTokens]:
        """Check new keys and values, ``[B, H, L, D]``, and hand them to the ``"svdq"`` attention.

        Raises
        ------
        ValueError
            For shapes or dtypes that do not fit each other or the tokens before; nothing is stored
            then.
        RuntimeError
            If tokens of the last call were never attended, so that they would be lost.
        """
        where, shape, dtype = f"layer {self.index}", tuple(key_states.shape), key_states.dtype
        if self.pending:
            raise RuntimeError(
                f"{where}: {self.pending} tokens given to update() were never attended; call "
                "reset()"
            )
        if len(shape) != 4 or 0 in shape or tuple(value_states.shape) != shape:
            raise ValueError(
                f"{where}: keys and values must be [B, H, L, D], of one shape and not empty, got "
                f"{shape} and {tuple(value_states.shape)}"
            )
        if value_states.dtype != dtype:
            raise ValueError(
                f"{where}: keys and values must have one dtype, got {dtype} and "
                f"{value_states.dtype}"
            )
        if self.seq_length == 0:
            self.lazy_initialization(key_states)
        expected = (self.batch_size, self.num_kv_heads, shape[2], self.head_dim)
        device = key_states.device
        if shape != expected or dtype != self.dtype or device != self.device:
            raise ValueError(
                f"{where}: the cache goes on with {self.dtype} of shape {expected} on "
                f"{self.device}, got {dtype} of {shape} on {device}; its batch changes through "
                "reorder_cache, batch_repeat_interleave and batch_select_indices"
            )
        states = (key_states, value_states)
        new = NewTokens(self, *(x if x.stride(3) == 1 else x.contiguous() for x in states))
        self.pending = shape[2]
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
    ) -> Tensor:
        """Attend over all cached and new tokens; store the new, pack what has left the window.

        Parameters
        ----------
        query : [B, Hq, L, D], rotated, in the dtype of the keys.
        new : of :meth:`update` for the same L tokens.
        sm_scale : softmax scale, ``D ** -0.5`` by default.
        rules : softcap, learned sinks and sliding window of the model.
        padding : left padding of each sequence; None where the model has no mask.
        position_ids : [B or 1, L] positions of the new tokens; None where the model does not pass
            them on.

        Returns
        -------
        out : [B, L, Hq, D]; zeros at padding.

        Raises
        ------
        ValueError
            For a query that does not fit, keys that are not finite, padding that changed or
            positions with gaps; the cache stays as it was.
        NotImplementedError
            For a softcap or a sliding window where the cache selects tokens (sparsity); likewise.
        """
        self.pending = 0
        length, is_first = new.keys.shape[2], self.seq_length == 0
        self._check_query(query, length)
        first_position = None
        if is_first:
            padding = [0] * self.batch_size if padding is None else padding
            first_position = self._first_position(position_ids, padding)
        else:
            self._check_goes_on(padding, position_ids)
        try:
            out = self.tokens.attend(
                query,
                new.keys,
                new.values,
                self.head_dim**-0.5 if sm_scale is None else sm_scale,
                rules=rules,
                padding=padding if is_first else None,
                first_position=first_position,
            )
        except BaseException:
            if is_first:
                self.reset()  # as empty as it was
            raise
        if is_first:
            self.padding, self.knows_positions = padding, position_ids is not None
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
        self.update(keys, values)
        self.pending = 0
        try:
            self.tokens.prefill(keys, values, energy, queries, rules)
        except BaseException:
            self.reset()
            raise
        self.padding, self.knows_positions = [0] * self.batch_size, True
        self.seq_length = keys.shape[2]

    # Checks

    def _check_query(self, query: Tensor, length: int) -> None:
        batch, heads, queries, dim = query.shape
        fits = (batch, queries, dim) == (self.batch_size, length, self.head_dim)
        if not fits or heads % self.num_kv_heads or query.dtype != self.dtype:
            raise ValueError(
                f"layer {self.index}: query must be {self.dtype} [{self.batch_size}, n * "
                f"{self.num_kv_heads}, {length}, {self.head_dim}], got {query.dtype} "
                f"{tuple(query.shape)}"
            )

    def _first_position(self, position_ids: Tensor | None, padding: list[int]) -> list[int]:
        """Position of each sequence's first token; it only matters where keys are un-rotated."""
        if position_ids is None or self.frequencies is None:
            return [0] * self.batch_size
        rows = self._rows_of(position_ids)
        first = [row[pad] for row, pad in zip(rows, padding, strict=True)]
        self._check_positions(rows, first, padding)
        return first

    def _check_goes_on(self, padding: list[int] | None, position_ids: Tensor | None) -> None:
        """New tokens must continue what is cached: same padding, next positions."""
        if padding is not None and padding != self.padding:
            raise ValueError(
                f"layer {self.index}: padding must stay as it was at prefill, {self.padding}, got "
                f"{padding}"
            )
        if position_ids is not None and self.knows_positions and self.frequencies is not None:
            batch = range(self.batch_size)
            first = [self.tokens.position[b] + self.tokens.count(b) for b in batch]
            self._check_positions(self._rows_of(position_ids), first, [0] * self.batch_size)

    def _check_positions(self, rows: list[list[int]], first: list[int], padding: list[int]) -> None:
        for b, row in enumerate(rows):
            expected = first[b] - padding[b]
            for i in range(padding[b], len(row)):
                if row[i] != expected + i:
                    raise ValueError(
                        f"layer {self.index}: token {i} of sequence {b} must be at position "
                        f"{expected + i}, got {row[i]}; only rope='post' takes others"
                    )

    def _rows_of(self, position_ids: Tensor) -> list[list[int]]:
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, self.batch_size):
            raise ValueError(
                f"layer {self.index}: position_ids must be [{self.batch_size} or 1, L], got "
                f"{tuple(position_ids.shape)}"
            )
        rows = read_positions(position_ids, self.seq_length)
        return rows if len(rows) == self.batch_size else rows * self.batch_size

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
        if length > self.seq_length:
            raise ValueError(
                f"layer {self.index}: cannot remove {length} tokens of {self.seq_length}"
            )
        if length == self.seq_length:
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

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that ``indices`` names, in its order."""
        if self.seq_length:
            self._select(torch.arange(self.batch_size, device=indices.device)[indices].tolist())
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
