"""What all peers share: from exact keys and values to a cache and its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache

from svdq_bench.quality.key_memory import KeyMemory, total_memory
from svdq_bench.quality.memory import full_cache_bytes
from svdq_bench.quality.prefix import Prefix, fork


class Peer:
    """Base of the methods that change keys and nothing else.

    A subclass is a frozen dataclass of its settings with ``label``, ``settings``, ``code`` and
    ``layer_memory``.
    """

    implementation = None

    @property
    def label(self) -> str:
        """The settings in a few words."""
        raise NotImplementedError

    def settings(self) -> dict:
        """Columns that name the settings."""
        raise NotImplementedError

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Keys [1, H, T, D] as they come back from their codes.

        Parameters
        ----------
        query_energy : [H, D] float32.
        """
        raise NotImplementedError

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """Memory of a layer of (KV heads, tokens, head_dim), exact numbers of ``itemsize`` bytes.

        Raises
        ------
        ValueError
            If there are too few tokens to code any, so that scores would be those of exact keys.
        """
        raise NotImplementedError

    def memory(self, prefix: Prefix) -> KeyMemory:
        """Memory of the keys of a context, from its shapes alone."""
        return total_memory(
            self.layer_memory(shape, prefix.itemsize) for shape in prefix.key_shapes
        )

    def compress(self, prefix: Prefix) -> DynamicCache:
        """A cache with the keys as they come back from their codes."""
        memory = self.memory(prefix)
        layers = prefix.cache.layers
        keys = {i: self.code(layers[i].keys, prefix.query_energy[i]) for i in prefix.full_layers}
        cache = fork(prefix.cache, keys)
        full_bytes = full_cache_bytes(prefix.cache)
        cache_bytes = full_bytes - memory.key_numbers * prefix.itemsize + memory.key_bytes
        # A peer's cache is a simulation: it cannot be asked for its bytes, so they travel with it.
        cache.peer_columns = {
            "k_bits": memory.k_bits,
            "all_in_bits": memory.all_in_bits,
            "cache_bytes": cache_bytes,
            "cache_ratio": full_bytes / cache_bytes,
        }
        return cache

    def columns(self) -> dict:
        """Columns of the settings in a row of results."""
        return {"method": self.label, "v_bits": "exact"} | self.settings()

    def memory_columns(self, cache: DynamicCache) -> dict:
        """Memory of the context that a cache of this method was made from."""
        return dict(cache.peer_columns)


@dataclass(frozen=True)
class FullCache:
    """The model's own cache."""

    label = "full cache"
    implementation = None

    def compress(self, prefix: Prefix) -> DynamicCache:
        """The same keys and values."""
        return fork(prefix.cache)

    def columns(self) -> dict:
        """The name alone."""
        return {"method": self.label}

    def memory_columns(self, cache: DynamicCache) -> dict:
        """Bits of the model's dtype, and the cache's bytes."""
        layer = next(layer for layer in cache.layers if not getattr(layer, "is_sliding", False))
        bits = 8 * layer.keys.itemsize
        return {
            "k_bits": bits,
            "all_in_bits": bits,
            "cache_bytes": full_cache_bytes(cache),
            "cache_ratio": 1.0,
        }
