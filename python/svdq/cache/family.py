"""Whether a family of models can use the cache at all, tried on a tiny model."""

from __future__ import annotations

import functools

import torch
from transformers import Cache, PretrainedConfig

from svdq.cache.build import Frequencies, make_layers
from svdq.cache.layer import SVDqLayer
from svdq.config.settings import Settings
from svdq.hf.arguments import cache_argument
from svdq.hf.attention import NAME
from svdq.hf.new_tokens import NotAttended
from svdq.hf.tiny_model import ConfigKey, aside, build, shrink

OUTSIDE = (
    "it computes with cached keys outside of the attention function that transformers lets others "
    "replace"
)


def check_family(config: PretrainedConfig) -> None:
    """Refuse a decoder that computes with its cached keys outside of its attention function.

    Raises
    ------
    NotImplementedError
        With the reason. A model that cannot be tried is not refused.
    """
    reason = _refusal(ConfigKey(config))
    if reason is not None:
        raise NotImplementedError(f"SVDqCache does not support {config.model_type!r}: {reason}")


@functools.lru_cache(maxsize=64)
def _refusal(key: ConfigKey) -> str | None:
    try:
        with aside():
            small = shrink(key.config)
            model = build(small, NAME)
            settings = Settings.of(preset="exact")
            layers = make_layers(small, settings, Frequencies(small), None)
            model(torch.tensor([[1, 2]]), use_cache=True, **cache_argument(Cache(layers=layers)))
        if not any(isinstance(layer, SVDqLayer) and layer.seq_length for layer in layers):
            return "it does not put its keys into the cache that it is given"
    except NotAttended:
        return OUTSIDE
    except KeyError as error:  # a table of the family's own
        return OUTSIDE if error.args == (NAME,) else None
    except NotImplementedError as error:
        return str(error)
    except Exception:  # the tiny model has failed, of whatever reason its family may have
        return None
    return None
