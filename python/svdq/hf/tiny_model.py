"""A model of a configuration with everything made small that does not shape its keys."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig
from transformers.utils import logging

VOCABULARY = 32
INNER = 16
MAX_EXPERTS = 8
# The words by which configurations name sizes of feed-forward networks, and numbers of experts.
INNER_WORDS = ("intermediate_size", "ffn", "n_inner", "inner_size", "mlp_hidden")
EXPERT_WORDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class ConfigKey:
    """A configuration as a key of a dictionary: two that say the same are equal."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self._text = (type(config), config.to_json_string(use_diff=False))

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigKey) and self._text == other._text


def attribute(config: PretrainedConfig, name: str) -> Any:
    """An attribute of a configuration, None where it has none; that of most layers where they
    differ, which transformers refuses to tell."""
    try:
        return getattr(config, name, None)
    except Exception:
        return vars(config).get(name)


def shrink(config: PretrainedConfig, *, keep_width: bool = False) -> PretrainedConfig:
    """A copy of a decoder's configuration for a model that is built and run in milliseconds.

    Layers, their types, head_dim and rotary embeddings stay. Of the heads one is left, unless
    ``keep_width``, for models whose other sizes depend on the width.
    """
    small = copy.deepcopy(config)
    values = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    values |= {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    for name, value in vars(config).items():
        if any(word in name for word in INNER_WORDS):
            if type(value) is int:
                values[name] = min(value, INNER)
            elif isinstance(value, (list, tuple)) and all(type(x) is int for x in value):
                values[name] = [min(x, INNER) for x in value]
        if type(value) is int and name in EXPERT_WORDS:
            values[name] = min(value, MAX_EXPERTS)
        if type(value) is int and name.startswith("linear_"):
            values[name] = 1 if "num" in name else min(value, INNER)
    if not keep_width:
        head_dim = attribute(config, "head_dim")
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        values |= {"hidden_size": head_dim, "num_attention_heads": 1, "num_key_value_heads": 1}
        if vars(config).get("num_key_value_heads", 1) is None:
            small.num_key_value_heads = 1
    for name, value in values.items():
        if attribute(small, name) is not None:
            setattr(small, name, value)
    return small


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Build and run models on the CPU in float32, and leave no random numbers and no logs."""
    verbosity, dtype = logging.get_verbosity(), torch.get_default_dtype()
    threads = torch.get_num_threads()
    logging.set_verbosity(logging.CRITICAL)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)  # waking others takes longer than a layer
    try:
        with (
            torch.device("cpu"),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(),
            torch.autocast("cpu", enabled=False),
        ):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        logging.set_verbosity(verbosity)


def build(config: PretrainedConfig, attention: str = "eager") -> nn.Module:
    """A random model of a decoder's configuration with this attention implementation.

    Raises
    ------
    ValueError
        If transformers knows no model of this configuration.
    """
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        found = mapping.get(type(config), None)
        if isinstance(found, (list, tuple)):
            found = found[0]
        if found is not None:
            options = {"attn_implementation": attention, "dtype": torch.float32}
            return found._from_config(config, **options).eval()
    raise ValueError(f"transformers has no model for {type(config).__name__}")
