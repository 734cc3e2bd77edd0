"""The attention implementation that a model runs under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def attention(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Give a model another attention implementation for a while; None leaves it as it is."""
    before = model.config._attn_implementation
    if implementation is not None:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if implementation is not None:
            model.set_attn_implementation(before)
