"""Inverse frequencies of rotary position embeddings, read from a model's configuration.

Keys reach a cache rotated. With ``rope="pre"`` they are stored un-rotated, which needs the
frequencies that rotated them. The inverse rotation is orthogonal whatever the frequencies, so a
cache stays correct even where a model scales its cosines (YaRN); other frequencies than
the model's would cost accuracy alone.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Frequencies of "dynamic" change with the length and keys already cached keep their old ones.
SUPPORTED_TYPES = ("default", "linear", "llama3", "longrope", "proportional", "yarn")


def inverse_frequencies(
    config: PretrainedConfig, layer_idx: int, max_position: int = 0
) -> Tensor | None:
    """Inverse frequencies of one layer of a decoder.

    Parameters
    ----------
    config : configuration of the text decoder.
    layer_idx : index of the layer; models may rotate each layer type in its own way, or not at all.
    max_position : largest position in use, which decides between the two sets of ``"longrope"``.

    Returns
    -------
    inv_freq : [rotary_dim / 2] float32 on the CPU, or None where the layer does not rotate.

    Raises
    ------
    NotImplementedError
        Where the rotation cannot be undone from the configuration: multi-section, dynamic or
        interleaved rotary embeddings, or a model without any. ``rope="post"`` works for all of
        them.
    """
    with torch.device("cpu"):
        return _inverse_frequencies(config, layer_idx, max_position)


def _inverse_frequencies(
    config: PretrainedConfig, layer_idx: int, max_position: int
) -> Tensor | None:
    # One number per layer: 1 where it does rotate.
    rotates = getattr(config, "no_rope_layers", None)
    if rotates and not rotates[layer_idx]:
        return None
    layer_type = _layer_type(config, layer_idx)
    if layer_type is not None and config.rope_parameters[layer_type] is None:
        return None
    parameters = _parameters(config, layer_type)
    rope_type = parameters["rope_type"]
    if "mrope_section" in parameters or rope_type == "mrope":
        raise CannotUnrotate(config, "its rotary embedding has several sections (mrope)")
    if rope_type not in SUPPORTED_TYPES:
        raise CannotUnrotate(config, f"its rope type is {rope_type!r}, known are {SUPPORTED_TYPES}")
    _check_pairs_are_halves(config)
    if rope_type == "default":
        return _default_frequencies(config, parameters)
    per_type = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](
        config, torch.device("cpu"), seq_len=max_position + 1, **per_type
    )
    return inv_freq.float()


def _layer_type(config: PretrainedConfig, layer_idx: int) -> str | None:
    """The layer's type, where the rope parameters are nested by type (transformers 5)."""
    layer_types = getattr(config, "layer_types", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if layer_types and layer_types[layer_idx] in parameters:
        return layer_types[layer_idx]
    return None


def _parameters(config: PretrainedConfig, layer_type: str | None) -> dict:
    """Rope parameters of one layer type with ``rope_type`` and ``rope_theta`` filled in."""
    found = dict(getattr(config, "rope_parameters", None) or {})  # transformers 5
    if layer_type is not None:
        found = dict(found[layer_type])
    if not found:  # transformers 4
        found = dict(getattr(config, "rope_scaling", None) or {})
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", getattr(config, "rope_theta", None))
    found.setdefault("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    if found["rope_theta"] is None:
        raise CannotUnrotate(config, "its configuration has no rope_theta")
    return found


def _default_frequencies(config: PretrainedConfig, parameters: dict) -> Tensor:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_dim * parameters["partial_rotary_factor"])
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return 1.0 / parameters["rope_theta"] ** exponents


def _check_pairs_are_halves(config: PretrainedConfig) -> None:
    """Refuse a model whose ``rotate_half`` pairs other channels than ``i`` and ``i + half``."""
    for cls in type(config).__mro__:
        name = cls.__module__.replace(".configuration_", ".modeling_")
        if name != cls.__module__:
            break
    else:
        raise CannotUnrotate(config, "the module of its model is not known")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:  # models of another family; how they rotate is observed
        return
    rotate_half = getattr(module, "rotate_half", None)
    if rotate_half is None and hasattr(module, "_apply_rotary_emb"):  # GPT-OSS
        cosine, sine = torch.zeros(2), torch.ones(2)  # of a quarter of a turn
        rotate_half = functools.partial(module._apply_rotary_emb, cos=cosine, sin=sine)
    if rotate_half is None:
        raise CannotUnrotate(config, f"{name} has no rotate_half to tell which channels form pairs")
    if rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        raise CannotUnrotate(config, "it rotates neighbouring channels (interleaved), not halves")


class CannotUnrotate(NotImplementedError):
    """Keys that ``rope="pre"`` cannot un-rotate, and the reason."""

    def __init__(self, config: PretrainedConfig, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f'rope="pre" cannot un-rotate the keys of {config.model_type!r}: {reason}. Use '
            'rope="post".'
        )
