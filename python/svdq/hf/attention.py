"""The attention and mask functions that ``attn_implementation="svdq"`` names in transformers."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from svdq.hf.logit_rules import check_finite, logit_rules
from svdq.hf.masks import CausalMask, read_mask, svdq_mask
from svdq.hf.new_tokens import StepTokens
from svdq.ops.exact import exact_attention

NAME = "svdq"

# Arguments of a model's attention function that neither the cache nor exact attention supports;
# each name with the value that asks for nothing, as None always does.
UNSUPPORTED = {
    "head_mask": None,
    "position_bias": None,
    "sinks": None,
    "output_attentions": False,
    "indices": None,
    "block_indices": None,
}
# Those that transformers' "sdpa" does not look at.
DROPPED = ["head_mask", "sinks", "indices", "block_indices"]
if "position_bias" not in inspect.signature(sdpa_attention_forward).parameters:
    DROPPED.append("position_bias")


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
        asked = [name for name in DROPPED if kwargs.get(name) is not None]
        if asked:
            raise NotImplementedError(
                f'attention "svdq" does not support {", ".join(asked)}, which "sdpa" would ignore'
            )
        attend = _exact_attention if _needs_exact(kwargs) else sdpa_attention_forward
        return attend(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    layer = key.layer
    if key.stored_with is not None and layer.lends and value is key:
        _check_supported(module, query, dropout, kwargs)
        rules = logit_rules(query, kwargs)
        _, mask = read_mask(attention_mask, layer.seq_length)
        return layer.attend_again(query, key, scaling, rules=rules, mask=mask).contiguous(), None
    if layer.is_static:  # masks, positions and sinks were checked with the first tokens
        _check_supported(module, query, dropout, kwargs)
        rules = logit_rules(query, kwargs)
        return layer.attend(query, key, scaling, rules=rules).contiguous(), None
    try:
        given = _checked(module, query, key, value, attention_mask, dropout, **kwargs)
    except BaseException:
        layer.take_back()
        raise
    return layer.attend(query, key, scaling, **given).contiguous(), None


@torch.compiler.disable
def _checked(
    module: nn.Module,
    query: Tensor,
    key: StepTokens,
    value: StepTokens,
    attention_mask: Any,
    dropout: float,
    **kwargs: Any,
) -> dict[str, Any]:
    """Rules, mask and positions, as a layer takes them; fails for what it does not support."""
    if value is not key or not key.layer.pending:
        raise RuntimeError(
            "key and value must come from the same call of SVDqCache.update, used once"
        )
    _check_supported(module, query, dropout, kwargs)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and query.shape[2] > 1 and not is_causal:  # else the mask says it
        raise NotImplementedError("attention over an SVDqCache does not support is_causal=False")
    key.layer.check_model(getattr(getattr(module, "config", None), "num_hidden_layers", None))
    rules = logit_rules(query, kwargs)
    if kwargs.get("s_aux") is not None:
        check_finite(kwargs["s_aux"])
    padding, mask = read_mask(attention_mask, key.layer.seq_length + key.keys.shape[2])
    positions = kwargs.get("position_ids")
    return {"rules": rules, "padding": padding, "position_ids": positions, "mask": mask}


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
