"""A step of a model over all layers of a cache: stored by all of them, or taken back in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers.cache_utils import CacheLayerMixin

from svdq.fit.allocator import Allocator

Undo = Callable[[], None]


class Revocable(Protocol):
    """A layer that can go back to where it stands."""

    pending: int

    def checkpoint(self, new_tokens: int) -> Undo:
        """What to call to forget all that happens from here on to so many tokens."""


class Step:
    """The layers that have got the tokens of the model's current call, and the way back.

    A step begins with the first layer that gets new tokens and ends when all layers have stored
    theirs. Until then :meth:`take_back` leaves the cache as if the call had never been made.

    Parameters
    ----------
    layers : of the cache; those that hold no tokens (linear attention, shared keys) take no part.
    allocator : of the cache, or None.
    """

    def __init__(self, layers: Sequence[Any], allocator: Allocator | None) -> None:
        self._layers, self._allocator = layers, allocator
        self._size = sum(isinstance(layer, CacheLayerMixin) for layer in layers)
        # States of linear attention are overwritten by every token.
        self._revocable = all(not hasattr(layer, "recurrent_states") for layer in layers)
        self.forget()

    def forget(self) -> None:
        """Begin anew, with what the layers hold."""
        self._undo: dict[int, Undo] = {}
        self._stored: set[int] = set()
        self.is_broken = False

    @property
    def is_open(self) -> bool:
        """True if some layers have got new tokens and others have not."""
        return bool(self._undo)

    def begin(self, index: int, new_tokens: int) -> None:
        """Layer ``index`` is about to get new tokens.

        Raises
        ------
        RuntimeError
            If it has got some since the last step ended: that step is taken back. Or if a step
            could not be taken back.
        """
        self.check()
        if index in self._undo:
            reached = sorted(i for i in self._undo if i >= 0)
            self.take_back()
            self.check()
            raise RuntimeError(
                f"the last call gave new tokens to the layers {reached} of {self._size} and "
                "stopped there; it has been taken back in all of them, so call the model again. If "
                "it did not fail, the cache was made for a model with more layers"
            )
        if not self._undo and self._allocator is not None:
            self._undo[-1] = self._allocator.checkpoint()
        self._undo[index] = self._checkpoint(self._layers[index], new_tokens)

    def end(self, index: int) -> None:
        """Layer ``index`` has stored its tokens."""
        self._stored.add(index)
        if len(self._stored) >= self._size:
            self.forget()

    def take_back(self) -> None:
        """Forget the tokens of the current step in every layer."""
        undo = self._undo
        self.forget()
        for restore in undo.values():
            restore()
        self.is_broken = bool(undo) and not self._revocable

    def check(self) -> None:
        """Fails after a step that could not be taken back."""
        if self.is_broken:
            raise RuntimeError(
                "a call failed after layers of linear attention had taken its tokens, which they "
                "cannot give back: call reset(), or go on with a copy of the cache from before"
            )

    def _checkpoint(self, layer: Any, new_tokens: int) -> Undo:
        if hasattr(layer, "checkpoint"):
            return layer.checkpoint(new_tokens)
        # Layers of transformers put new tensors in the place of old ones.
        attributes = dict(vars(layer))

        def restore() -> None:
            vars(layer).clear()
            vars(layer).update(attributes)

        return restore
