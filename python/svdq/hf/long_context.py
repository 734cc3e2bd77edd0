"""Models that replace a user's cache while they generate: Phi-3 and its relatives.

They rotate keys by other frequencies once a sequence is longer than their original context, which
makes all cached keys useless. So ``generate`` drops the cache at that token, reads the whole
sequence again and goes on with a cache of its own. Here it goes on with the user's, emptied.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin, PretrainedConfig

from svdq.hf.arguments import cache_argument

MARK = "_svdq_keeps_the_cache"


def keep_cache(config: PretrainedConfig, kind: type) -> None:
    """Make models of this configuration go on with a given cache of class ``kind``.

    Only classes that prepare the inputs of generation in their own way are changed, once.
    """
    for cls in _model_classes(config):
        own = cls.prepare_inputs_for_generation
        if own is GenerationMixin.prepare_inputs_for_generation or hasattr(own, MARK):
            continue
        cls.prepare_inputs_for_generation = _keeping(own, kind)


def _model_classes(config: PretrainedConfig) -> list[type]:
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    found = found if isinstance(found, (list, tuple)) else [found]
    return [cls for cls in found if cls is not None and issubclass(cls, GenerationMixin)]


def _keeping(prepare: Any, kind: type) -> Any:
    name = next(iter(cache_argument(None)))

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> dict:
        inputs = prepare(self, input_ids, *args, **kwargs)
        given = kwargs.get(name, args[0] if args else None)
        if isinstance(given, kind) and inputs.get(name) is not given:
            read = inputs.get("input_ids")
            if inputs.get(name) is not None or read is None or read.shape != input_ids.shape:
                raise NotImplementedError(
                    f"{type(self).__name__} replaced the {kind.__name__} that it was given, which "
                    "would go unused; shorten the sequence to its original context"
                )
            given.reset()
            inputs[name] = given
            length = read.shape[1]
            for positions in ("cache_position", "position_ids"):  # of the last token alone
                found = inputs.get(positions)
                if positions == "cache_position" and found is not None:
                    inputs[positions] = torch.arange(length, device=read.device)
                elif found is not None and found.shape[-1] != length:
                    inputs[positions] = None
        return inputs

    setattr(prepare_inputs_for_generation, MARK, True)
    return prepare_inputs_for_generation
