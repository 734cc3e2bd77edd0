"""New tokens: a layer's ``update`` hands them to the ``"svdq"`` attention instead of tensors."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

from torch import Tensor

from svdq.ops import NO_RULES, LogitRules


class AttendingLayer(Protocol):
    """A layer of a cache that attends to its own tokens.

    Attributes
    ----------
    pending : tokens handed out that are not stored yet.
    seq_length : tokens stored.
    is_static : whether the host does not know its lengths: masks and positions are not read.
    lends : whether other layers of the model attend to its tokens, too.
    """

    pending: int
    seq_length: int
    is_static: bool
    lends: bool

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
        """Attend to stored and new tokens, and store the new: [B, L, Hq, D]."""

    def attend_again(
        self,
        query: Tensor,
        new: NewTokens,
        sm_scale: float | None = None,
        *,
        rules: LogitRules = NO_RULES,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to stored tokens by the queries of another layer: [B, L, Hq, D]."""

    def check_model(self, num_layers: int | None) -> None:
        """Refuse tokens of a model with another number of layers; None where it is not known."""

    def take_back(self) -> None:
        """Forget the tokens of the model's current call, in all layers of the cache."""


class StepTokens:
    """Keys and values on their way to the ``"svdq"`` attention, as a compiler can follow them."""

    def __init__(self, layer: AttendingLayer, keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values
        self.stored_with: int | None = None  # tokens that the layer holds since it stored these


class NotAttended(RuntimeError):
    """Something other than the ``"svdq"`` attention tried to use new tokens."""


class NewTokens(StepTokens):
    """The same outside of compiled steps; nothing else may use them."""

    def _refuse(self, *_: Any) -> NoReturn:
        self.layer.take_back()  # they will never be stored
        raise NotAttended(
            "an SVDqCache hands its keys and values to the attention implementation 'svdq' alone, "
            "and something else tried to use them: load the model with attn_implementation='svdq' "
            "or call model.set_attn_implementation('svdq'). If that is set, this model computes "
            "with cached keys outside of its attention function and cannot use SVDqCache."
        )

    def to(self, *_: Any, **__: Any) -> NewTokens:
        """These tokens, which stay where their layer is; models that share keys call it."""
        return self

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> NoReturn:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, cls):
                    item._refuse()
        raise TypeError(f"{func} does not take keys and values of an SVDqCache")
