"""The tokens that a layer of a cache holds, and what transformers does to them between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from svdq.cache.step import Step, Undo
from svdq.config.settings import Settings
from svdq.fit.calibration import CalibratedLayer
from svdq.fit.layer_fit import Allocate
from svdq.store.layer_store import LayerStore


class HeldLayer(CacheLayerMixin):
    """A layer's tokens, with the methods of transformers' layers except ``update``.

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
    lends : set by the cache; whether later layers of the model attend to this one's tokens.
    calibrated : set by a cache with a calibration; what was calibrated for this layer.
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
        self.lends = False
        self.calibrated: CalibratedLayer | None = None
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
        calibrated = None
        if self.calibrated is not None:
            self.calibrated.check_shape(self.index, heads, dim)
            calibrated = self.calibrated.on(key_states.device)
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
            calibrated=calibrated,
            sparsity=self.sparsity,
        )
        self.is_initialized = True

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
