"""The attention and mask functions that ``attn_implementation="svdq"`` names in transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)

from svdq.hf.logit_rules import check_finite, logit_rules
from svdq.hf.new_tokens import StepTokens
from svdq.ops.exact import exact_attention

NAME = "svdq"

# Arguments of a model's attention function that neither the cache nor exact attention supports;
# each name with the value that asks for nothing, as None always does.
UNSUPPORTED = {
    "head_mask": None,
    "position_bias": None,
    "output_attentions": False,
    "is_causal": True,
}


class CausalMask:
    """A causal mask with left padding, as two numbers a sequence instead of L x T.

    Layers whose cache is not compressed get the dense mask of ``"sdpa"``, made when the first of
    them asks.

    Parameters
    ----------
    attention_mask : [B, T] bool, True for real tokens, or None without padding.
    kv_length : keys that the mask covers, T.
    plain : whether the model asks for nothing but causality and padding.
    dense : makes the mask of transformers' ``"sdpa"`` attention.
    """

    ndim = 4  # as transformers asks of masks that are ready

    def __init__(
        self,
        attention_mask: Tensor | None,
        kv_length: int,
        plain: bool = True,
        dense: Callable[[], Tensor | None] | None = None,
    ) -> None:
        self.attention_mask, self.kv_length, self.plain = attention_mask, kv_length, plain
        self._make_dense = dense

    @functools.cached_property
    def dense(self) -> Tensor | None:
        """[B, 1, L, T] bool, or None where SDPA's own causal mask will do."""
        return self._make_dense()

    @functools.cached_property
    def padding(self) -> list[int] | None:
        """Left padding of each sequence, None where the model gave no mask.

        Raises
        ------
        ValueError
            For any other mask: a hole, right padding, a sequence of padding alone.
        """
        if not self.plain:
            raise ValueError(
                "SVDqCache supports causal masks with left padding, the model asks for another"
            )
        if self.attention_mask is None:
            return None
        mask = self.attention_mask
        if mask.ndim != 2 or mask.shape[1] != self.kv_length:
            raise ValueError(
                f"attention_mask must be [B, {self.kv_length}], cached tokens included, got "
                f"{tuple(mask.shape)}"
            )
        padding = self.kv_length - mask.sum(dim=1)
        slots = torch.arange(self.kv_length, device=mask.device)
        if not torch.equal(mask, slots >= padding[:, None]) or (padding == self.kv_length).any():
            raise ValueError(
                "attention_mask must be left padding, zeros and then at least one 1 in every row; "
                "holes and right padding are not supported"
            )
        return padding.tolist()


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
    if local_size is not None or isinstance(q_offset, Tensor):
        return dense()
    if isinstance(attention_mask, CausalMask):  # made before the model was called
        return attention_mask
    return CausalMask(attention_mask, kv_length, mask_function is causal_mask_function, dense)


def svdq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | StepTokens,
    value: Tensor | StepTokens,
    attention_mask: CausalMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of ``"svdq"``.

    Keys and values of an :class:`svdq.SVDqCache` are attended packed; plain tensors (sliding-window
    layers, or a model without this cache) go to transformers' ``"sdpa"``, or to exact attention
    in float32 where a model asks for a softcap or learned sinks, which ``"sdpa"`` does not know.

    Parameters
    ----------
    module : the model's attention module.
    query : [B, Hq, L, D].
    key, value : as the cache's ``update`` returned them.
    attention_mask : of :func:`svdq_mask`; or [B, T] bool for a direct call.
    dropout, scaling, kwargs : as transformers passes them; read are ``position_ids``, ``softcap``,
        ``s_aux`` (learned sinks) and ``sliding_window``, which on plain tensors is in the mask.

    Returns
    -------
    out : [B, L, Hq, D].
    weights : None, attention weights are never formed.

    Raises
    ------
    NotImplementedError
        For what a compressed cache does not support: dropout, attention weights, gradients; softcap
        and ``sliding_window`` where it selects tokens.
    ValueError
        For learned sinks that are not finite or not one a query head, and input that the cache
        refuses.
    """
    if not isinstance(key, StepTokens):
        if isinstance(attention_mask, CausalMask):
            attention_mask = attention_mask.dense
        attend = _exact_attention if _needs_exact(kwargs) else sdpa_attention_forward
        return attend(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    layer, layer_pending = key.layer, key.layer.pending
    layer.pending = 0  # if a check below fails, these tokens will not be stored
    if value is not key or not layer_pending:
        raise RuntimeError(
            "key and value must come from the same call of SVDqCache.update, used once"
        )
    _check_supported(module, query, dropout, kwargs)
    rules, sinks, padding = logit_rules(query, kwargs), kwargs.get("s_aux"), None
    if layer.is_static:  # masks, positions and sinks were checked with the first tokens
        return layer.attend(query, key, scaling, rules=rules), None
    if sinks is not None:
        check_finite(sinks)
    if isinstance(attention_mask, Tensor):
        kv_length = layer.seq_length + query.shape[2]
        attention_mask = CausalMask(attention_mask, kv_length)
    if attention_mask is not None:
        padding = attention_mask.padding
    position_ids = kwargs.get("position_ids")
    out = layer.attend(query, key, scaling, rules=rules, padding=padding, position_ids=position_ids)
    return out, None


def _needs_exact(kwargs: dict[str, Any]) -> bool:
    """True if a model asks for what transformers' ``"sdpa"`` does not know."""
    return bool(kwargs.get("softcap")) or kwargs.get("s_aux") is not None


def _exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands in for transformers' ``sdpa_attention_forward``: the same arguments and result."""
    asked = _unsupported(dropout, kwargs)
    if asked:
        raise NotImplementedError(
            f"attention with softcap or s_aux does not support {', '.join(asked)}"
        )
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and length > 1:  # a static cache may have room behind them
        key, value = key[:, :, :length], value[:, :, :length]
    rules = replace(logit_rules(query, kwargs), window_size=0)  # the mask has it
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    out, _ = exact_attention(
        query, key, value, scale, rules, mask=attention_mask, causal=causal and length > 1
    )
    return out.transpose(1, 2).contiguous(), None


def _unsupported(dropout: float, kwargs: dict[str, Any]) -> list[str]:
    asked = [name for name, off in UNSUPPORTED.items() if kwargs.get(name) not in (None, off)]
    return [*asked, f"dropout={dropout}"] if dropout else asked


def _check_supported(
    module: nn.Module, query: Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    asked = _unsupported(dropout, kwargs)
    if not getattr(module, "is_causal", True):
        asked.append("is_causal=False")
    sinks = kwargs.get("s_aux")
    needs_grad = query.requires_grad or (sinks is not None and sinks.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        asked.append("gradients (call the model under torch.inference_mode())")
    if asked:
        raise NotImplementedError(
            f"attention over an SVDqCache does not support {', '.join(asked)}"
        )


def register() -> None:
    """Make ``attn_implementation="svdq"`` known to transformers."""
    AttentionInterface.register(NAME, svdq_attention)
    AttentionMaskInterface.register(NAME, svdq_mask)
