"""The name under which a model takes its cache, by the installed transformers."""

from __future__ import annotations

import functools
import inspect
from typing import Any


@functools.cache
def _cache_name() -> str:
    from transformers import GenerationMixin

    # The argument has one name in all models and in generation.
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """A cache as keyword argument of a model's ``forward`` and ``generate``.

    ``{"cache": cache}``, or ``{"past_key_values": cache}`` where the installed transformers knows
    the old name alone.
    """
    return {_cache_name(): cache}
