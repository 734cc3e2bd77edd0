"""One full-attention layer of an :class:`svdq.SVDqCache`: its attention, its part in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from svdq import ops
from svdq.config.settings import Settings
from svdq.hf.exact import causal_attention_with_lse, ragged_attention
from svdq.hf.new_tokens import NewTokens
from svdq.hf.positions import read_positions
from svdq.layout import PAGE_TOKENS
from svdq.store.attend import attend_stores
from svdq.store.layer_store import Allocate, TokenStore

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# On a CPU, longer chunks attend among themselves with PyTorch's kernel. On a GPU the attend stage
# has tiles for them.
FUSED_QUERIES = PAGE_TOKENS


class SVDqLayer(CacheLayerMixin):
    """Keys and values of one layer, packed but for the sinks and a sliding window.

    ``update`` only checks the new tokens and hands them on; the ``"svdq"`` attention calls
    :meth:`attend`, which stores them.

    Parameters
    ----------
    index : index of the layer in its model, for messages.
    settings : how to compress.
    frequencies : maps the largest position in use to the inverse frequencies of the layer; None
        where its keys are packed as they come (``rope="post"``).
    allocate : asks for the layer's bands, see :class:`svdq.tokens.TokenStore`; None where a
        schedule says them.
    """

    is_compileable = False
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
        self.settings = settings
        self.sparsity = settings.sparsity(index)
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
        self.tokens: TokenStore | None = None
        self.attended: list[int] | None = (
            None  # packed tokens of each store in the last step, if its state still stands
        )

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
        self.padding = [0] * batch
        self.tokens = TokenStore(
            self.settings,
            (batch, heads, dim),
            self.dtype,
            self.device,
            self.frequencies,
            self.allocate,
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
        module: nn.Module,
        query: Tensor,
        new: NewTokens,
        scaling: float | None = None,
        padding: list[int] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend over all cached and new tokens; store the new, pack what has left the window.

        Parameters
        ----------
        module : the model's attention module.
        query : [B, Hq, L, D], rotated, in the dtype of the keys.
        new : what :meth:`update` returned for the same L tokens.
        scaling : softmax scale, ``D ** -0.5`` by default.
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
        """
        self.pending = 0
        keys, values = new.keys, new.values
        length = keys.shape[2]
        self._check_query(query, length)
        scaling = self.head_dim**-0.5 if scaling is None else scaling
        if self.seq_length == 0:
            padding = [0] * self.batch_size if padding is None else padding
            out = self._prefill(module, query, keys, values, scaling, padding, position_ids)
        else:
            self._check_goes_on(padding, position_ids)
            on_cpu = self.device.type == "cpu"
            if on_cpu and length > FUSED_QUERIES and self.tokens.any_packed:
                out = self._extend_by_chunk(query, keys, values, scaling)
            else:
                out = self._extend(module, query, keys, values, scaling)
        self.seq_length += length
        return out

    def _prefill(self, module, query, keys, values, scaling, padding, position_ids) -> Tensor:
        """The first tokens attend exactly; then everything but sinks and window is packed."""
        first_position = self._first_position(position_ids, padding)
        spans = [(pad, keys.shape[2]) for pad in padding]
        # PyTorch's kernel is slower by some per cent where rows lie apart. The copies are gone
        # before anything is packed.
        contiguous = keys.contiguous(), values.contiguous()
        out = ragged_attention(module, query, *contiguous, scaling, spans)
        del contiguous
        try:
            self.tokens.note_queries(query, scaling, padding)
            self.tokens.prefill(keys, values, padding, first_position)
        except BaseException:
            self.reset()  # as empty as it was
            raise
        self.padding = padding
        self.knows_positions = position_ids is not None
        return out

    def prefill_from(self, keys: Tensor, values: Tensor, energy: Tensor | None) -> None:
        """Take tokens that were attended elsewhere, [B, H, T, D] at positions 0 .. T - 1.

        ``energy`` is that of the scaled queries, [H, D]; needed where ``settings`` say so.
        """
        if energy is None and self.settings.needs_queries:
            raise ValueError(
                f"layer {self.index}: to allocate bits or to weigh keys, query_energy is needed"
            )
        self.update(keys, values)
        self.pending = 0
        none = [0] * self.batch_size
        try:
            if self.settings.needs_queries:
                self.tokens.energy.set(energy, keys.shape[2])
            self.tokens.prefill(keys, values, none, none)
        except BaseException:
            self.reset()
            raise
        self.padding, self.knows_positions = none, True
        self.seq_length = keys.shape[2]

    def _extend(self, module, query, keys, values, scaling) -> Tensor:
        """A few more tokens join the exact rows first and are attended there."""
        tokens = self.tokens
        tokens.note_queries(query, scaling, [0] * self.batch_size)
        tokens.append(keys, values)
        query = tokens.weighted_query(query)
        try:
            if tokens.any_packed:
                out = self._attend_packed(query, scaling, causal=True)[0].transpose(1, 2)
            else:
                rows, spans = tokens.rows, [(0, count) for count in tokens.rows.count]
                out = ragged_attention(module, query, rows.keys, rows.values, scaling, spans)
        except BaseException:
            tokens.retract(keys.shape[2])
            raise
        tokens.pack_window()
        return out

    def _extend_by_chunk(self, query, keys, values, scaling) -> Tensor:
        """Many more tokens attend among themselves and, apart from that, to all before them."""
        self._check_finite(keys, values)
        self.tokens.note_queries(query, scaling, [0] * self.batch_size)
        before = self._attend_packed(self.tokens.weighted_query(query), scaling, causal=False)
        among = causal_attention_with_lse(query, keys, values, scaling)
        out, _ = ops.merge(*before, *among)
        self.tokens.append_chunk(keys, values)
        return out.transpose(1, 2)

    def _attend_packed(self, query: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
        tokens = self.tokens
        *result, self.attended = attend_stores(
            query,
            tokens.stores,
            tokens.rows,
            scaling,
            self.settings.sink_tokens,
            causal,
            self.sparsity if query.shape[2] == 1 else None,
        )
        return tuple(result)

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

    def _check_finite(self, keys: Tensor, values: Tensor) -> None:
        """A chunk is stored piece by piece, so all of it is checked before the first."""
        for name, states in (("keys", keys), ("values", values)):
            if not torch.stack(torch.aminmax(states)).isfinite().all():  # a NaN is an extreme, too
                raise ValueError(f"layer {self.index}: {name} must be finite, got NaN or inf")

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

    # The rest of what transformers asks of a layer

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
            self.attended = None
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
            self.attended = None
            self.tokens.select(indices)
            self.padding = [self.padding[i] for i in indices]
            self.batch_size = len(indices)

    def offload(self) -> None:
        """Nothing to do: the cache stays where its keys are."""

    def prefetch(self) -> None:
        """Nothing to do: the cache stays where its keys are."""
