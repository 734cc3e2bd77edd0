"""Shapes of known language models, for benchmarks that need no weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The shapes that decide the arithmetic of a layer of a decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 5e5

    @property
    def layer_parameters(self) -> int:
        """Weights of a layer's matrix products: q, k, v, o, and the gated feed-forward part."""
        heads = 2 * self.num_qo_heads + 2 * self.num_kv_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    def prefill_flops(self, tokens: int) -> int:
        """Floating-point operations of one layer's prefill, its causal attention included.

        Embeddings and the head of the model are nobody's layer and not counted.
        """
        attention = 2 * self.num_qo_heads * self.head_dim * tokens**2  # half of two full products
        return 2 * self.layer_parameters * tokens + attention


MODELS = {
    "llama-3.1-8b": ModelShape(4096, 14336, 32, 32, 8, 128),
    "qwen2.5-7b": ModelShape(3584, 18944, 28, 28, 4, 128, 1e6),
    "gemma-3-4b": ModelShape(2560, 10240, 34, 8, 4, 256, 1e6),
    "smollm2-135m": ModelShape(576, 1536, 30, 9, 3, 64, 1e5),
}


def model_shape(name: str) -> ModelShape:
    """The shape of the model of this name."""
    if name not in MODELS:
        raise ValueError(f"model shape must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]
