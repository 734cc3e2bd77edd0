"""Masks of attention: the one that ``"svdq"`` makes, and what a mask says about left padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from svdq.layout import PAGE_TOKENS


class CausalMask:
    """A causal mask with left padding, as two numbers a sequence instead of L x T.

    The dense mask of ``"sdpa"`` is made where somebody needs it: layers whose cache is not
    compressed, and models that ask for more than causality and padding.

    Parameters
    ----------
    attention_mask : [B, T] bool, True for real tokens, or None without padding.
    kv_length : keys that the mask covers, T.
    plain : whether the model asks for nothing but causality and padding.
    dense : makes the mask of transformers' ``"sdpa"`` attention, [B, 1, L, T], or None where its
        kernels have another word for it.
    complete : makes the same in any case; needed unless ``plain``.
    """

    ndim = 4  # as transformers asks of masks that are ready

    def __init__(
        self,
        attention_mask: Tensor | None,
        kv_length: int,
        plain: bool = True,
        dense: Callable[[], Tensor | None] | None = None,
        complete: Callable[[], Tensor] | None = None,
    ) -> None:
        self.attention_mask, self.kv_length, self.plain = attention_mask, kv_length, plain
        self._make_dense, self._make_complete = dense, complete

    def __getitem__(self, index: Any) -> CausalMask:
        """The mask of some queries; the keys must be all of them."""
        dense = None if self._make_dense is None else lambda: _part(self.dense, index)
        complete = None if self._make_complete is None else lambda: self._make_complete()[index]
        return CausalMask(self.attention_mask, self.kv_length, self.plain, dense, complete)

    @functools.cached_property
    def dense(self) -> Tensor | None:
        """[B, 1, L, T] bool, or None where SDPA's own causal mask, or none, will do."""
        return self._make_dense()

    @functools.cached_property
    def padding(self) -> list[int] | None:
        """Left padding of each sequence, T where it has no token yet; None without a mask.

        Raises
        ------
        ValueError
            For any other mask: a hole, right padding.
        """
        mask = self.attention_mask
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[1] != self.kv_length:
            raise ValueError(
                f"attention_mask must be [B, {self.kv_length}], cached tokens included, got "
                f"{tuple(mask.shape)}"
            )
        padding = self.kv_length - mask.sum(dim=1)
        slots = torch.arange(self.kv_length, device=mask.device)
        if not torch.equal(mask, slots >= padding[:, None]):
            raise ValueError(
                "attention_mask must be left padding: zeros, then ones. Holes and right padding "
                "are not supported. Where rows of a batch have ended and others went on, "
                "continue each by itself: batch_select_indices([row]) on a copy of the cache, "
                "crop(-n) by the n tokens after its end, then its next tokens without a mask"
            )
        return padding.tolist()

    @functools.cached_property
    def extra(self) -> Tensor | None:
        """The dense mask [B, 1, L, T] where it says more than causality and padding, else None."""
        if self.plain:
            return None
        mask, pads = self._make_complete(), self.padding
        return None if _is_causal(mask, pads or [0] * len(mask)) else mask


def _part(dense: Tensor | None, index: Any) -> Tensor | None:
    return None if dense is None else dense[index]


def read_mask(mask: Any, kv_length: int) -> tuple[list[int] | None, Tensor | None]:
    """Padding of each sequence, and the mask itself where it is not causal with that padding.

    Parameters
    ----------
    mask : a :class:`CausalMask`; [B, T] bool, True for real tokens; [B or 1, 1 or Hq, L, T] bool or
        a float to add to the scores; None.
    kv_length : keys that the mask must cover, T.

    Returns
    -------
    padding : per row of the mask; None where there is no mask.
    extra : [B or 1, 1 or Hq, L, T] as it was given, or None.

    Raises
    ------
    ValueError
        For a mask of another length, or one of two dimensions with holes.
    """
    if mask is None:
        return None, None
    if isinstance(mask, Tensor):
        if mask.ndim != 4:
            mask = CausalMask(mask, kv_length)
        elif mask.shape[3] < kv_length:
            raise ValueError(
                f"attention_mask must cover {kv_length} keys, cached tokens included, got "
                f"{tuple(mask.shape)}"
            )
        else:
            return _read_dense(mask[..., :kv_length])
    return mask.padding, mask.extra


def _read_dense(mask: Tensor) -> tuple[list[int], Tensor | None]:
    """The same for a dense mask, whose last queries tell the padding."""
    seen = visible(mask)
    # Before the first token that the last query sees there is padding, unless that saw something.
    last = seen[:, :, -1].any(dim=1)
    padding = (last.int().cumsum(1) == 0).sum(1).tolist()
    padding = [_is_padding(seen[b], pad) * pad for b, pad in enumerate(padding)]
    causal = seen.shape[1] == 1 and _is_causal(seen, padding) and _is_switch(mask)
    return padding, None if causal else mask


def _is_padding(seen: Tensor, pad: int) -> bool:
    """Whether queries before slot ``pad`` see nothing, or themselves alone, or, as PyTorch's
    kernels want it of queries that see nothing, all: [1 or Hq, L, T]."""
    length, total = seen.shape[1:]
    rows = seen[:, : max(pad - (total - length), 0)]
    own = torch.arange(total, device=seen.device) == torch.arange(
        total - length, total - length + rows.shape[1], device=seen.device
    ).unsqueeze(1)
    return bool((rows.all(2) | ~(rows & ~own).any(2)).all())


def visible(mask: Tensor) -> Tensor:
    """True where a mask lets a query see a key; a float mask hides what it lowers without bound."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _is_switch(mask: Tensor) -> bool:
    """Whether a mask only shows and hides, and adds nothing else to scores."""
    return mask.dtype == torch.bool or not bool((mask[visible(mask)] != 0).any())


def _is_causal(seen: Tensor, padding: list[int]) -> bool:
    """Whether [B, 1, L, T] is causal with this left padding; padding may see anything."""
    length, total = seen.shape[2:]
    slots = torch.arange(total, device=seen.device)
    own = torch.arange(total - length, total, device=seen.device)[:, None]
    start = torch.tensor(padding, device=seen.device)[:, None, None]
    expected = (slots <= own) & (slots >= start)
    return torch.equal(seen[:, 0] | (own < start), expected | (own < start))


def svdq_mask(
    *args: Any,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    q_offset: int | Tensor = 0,
    **kwargs: Any,
) -> CausalMask | Tensor | None:
    """Mask function of ``"svdq"``: a :class:`CausalMask`; for sliding layers the mask of SDPA."""
    if isinstance(q_offset, Tensor):  # the length that a static cache is about to change
        q_offset = q_offset.clone()
    dense = functools.partial(
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"],
        *args,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        q_offset=q_offset,
        **kwargs,
    )
    # A static cache reads masks where more than a page of tokens comes at once.
    is_step = isinstance(q_offset, Tensor) and kwargs.get("q_length", 1) <= PAGE_TOKENS
    if local_size is not None or is_step:
        return dense()
    if isinstance(attention_mask, CausalMask):  # made before the model was called
        return attention_mask
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    complete = functools.partial(dense, **skips)
    plain = mask_function is causal_mask_function
    return CausalMask(attention_mask, kv_length, plain, dense, complete)
