"""A layer of a cache with ``max_cache_len``: its steps run without the host where they can."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from svdq.cache.layer import SVDqLayer
from svdq.hf.new_tokens import NewTokens, StepTokens
from svdq.ops import NO_RULES, LogitRules
from svdq.store.static_step import MAX_QUERIES, StaticStep


class StaticSVDqLayer(SVDqLayer):
    """A layer that is *static* once its cache has called :meth:`start`.

    Then all lengths are on the device: a step of up to 64 tokens reads neither masks nor positions,
    which were checked with the first tokens, and can be compiled and captured. All else stops that
    first (:meth:`stop`); afterwards the cache starts it again.

    Attributes
    ----------
    settle : set by the cache; called when tokens have changed under the host.
    """

    settle: Callable[[], None] = staticmethod(lambda: None)

    def reset(self) -> None:
        """Forget all tokens and give their memory back."""
        super().reset()
        self.static: StaticStep | None = None

    @property
    def is_static(self) -> bool:
        """True while the host does not know the lengths."""
        return self.static is not None and self.static.active

    @property
    def is_compileable(self) -> bool:
        """True while it is static, and while it is empty: nobody asks between prompt and steps."""
        return self.is_static or self.seq_length == 0

    def start(self) -> None:
        """Become static, where every sequence is packed."""
        if self.static is None:
            self.static = StaticStep(self.tokens, self.settings.max_cache_len)
        self.static.start(self.seq_length)

    def stop(self) -> None:
        """Let the host know the lengths again."""
        if self.is_static:
            self.seq_length = self.static.stop()

    @contextlib.contextmanager
    def _on_host(self) -> Iterator[None]:
        """Let the host know the lengths meanwhile."""
        self.stop()
        yield
        self.settle()

    @property
    def can_start(self) -> bool:
        """True if a step would not have to fit anything."""
        return bool(self.seq_length) and self.tokens.static_possible

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StepTokens, StepTokens]:
        """As :meth:`SVDqLayer.update`; also refuses what the capacity does not hold."""
        length = key_states.shape[2]
        if self.is_static and length <= MAX_QUERIES:
            new = StepTokens(self, key_states, value_states)
            self.pending = length
            return new, new
        self.stop()
        if self.seq_length + length > self.settings.max_cache_len:
            raise ValueError(
                f"layer {self.index}: max_cache_len is {self.settings.max_cache_len}, too small "
                f"for {self.seq_length} + {length} tokens"
            )
        return super().update(key_states, value_states)

    def attend(
        self,
        query: Tensor,
        new: StepTokens,
        sm_scale: float | None = None,
        *,
        rules: LogitRules = NO_RULES,
        padding: list[int] | None = None,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`SVDqLayer.attend`; masks and positions are not read if static."""
        if self.is_static:
            self.pending = 0
            scale = self.head_dim**-0.5 if sm_scale is None else sm_scale
            return self.static.attend(query, new.keys, new.values, scale, rules)
        return self._attend_on_host(
            query,
            new,
            sm_scale,
            rules=rules,
            padding=padding,
            position_ids=position_ids,
            mask=mask,
        )

    @torch.compiler.disable
    def _attend_on_host(self, query: Tensor, new: NewTokens, *args: Any, **kwargs: Any) -> Tensor:
        out = super().attend(query, new, *args, **kwargs)
        self.settle()
        return out

    def get_seq_length(self) -> int | Tensor:
        """Tokens per sequence, left padding included; a tensor on the device while static."""
        return self.static.length if self.is_static else super().get_seq_length()

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of the mask; a static layer does not read it."""
        return (self.settings.max_cache_len, 0) if self.is_static else super().get_mask_sizes(query)

    def get_max_length(self) -> int:
        """Tokens that a sequence may have."""
        return self.settings.max_cache_len

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens, see :meth:`SVDqLayer.crop`."""
        with self._on_host():
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues the old sequence ``beam_idx[i]``."""
        with self._on_host():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        with self._on_host():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that ``indices`` names, in its order."""
        with self._on_host():
            super().batch_select_indices(indices)
