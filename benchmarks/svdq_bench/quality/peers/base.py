"""What all peers share: from exact keys and values to a cache and its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache

from svdq_bench.quality.key_memory import KeyMemory, total_memory
from svdq_bench.quality.memory import BF16_BYTES, full_cache_bytes
from svdq_bench.quality.peers.values import TokenRanges
from svdq_bench.quality.prefix import Prefix, fork


class Peer:
    """Base of the methods that code keys, and values if they are asked to.

    A subclass is a frozen dataclass of its settings with ``label``, ``settings``, ``code`` and
    ``layer_memory``, and ``values`` or the two methods that use it.

    Attributes
    ----------
    v_bits : bits of a value's code; None where values stay exact.
    """

    implementation = None
    v_bits: int | None = None

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
        """Memory of a coded layer's keys.

        Parameters
        ----------
        shape : KV heads, tokens, head_dim.
        itemsize : bytes of an exact number.

        Raises
        ------
        ValueError
            If there are too few tokens to code any, so that scores would be those of exact keys.
        """
        raise NotImplementedError

    @property
    def values(self) -> TokenRanges | None:
        """How values are coded; None for not at all."""
        return None

    def code_layer(self, prefix: Prefix, layer: int) -> Tensor:
        """Keys [1, H, T, D] of a layer of a context as they come back from their codes."""
        return self.code(prefix.cache.layers[layer].keys, prefix.query_energy[layer])

    def code_values(self, values: Tensor) -> Tensor:
        """Values [1, H, T, D] as they come back from their codes."""
        return values if self.values is None else self.values.code(values)

    def value_bytes(self, shape: tuple[int, int, int], itemsize: int) -> int:
        """Bytes of a coded layer's values, parameters as for :meth:`layer_memory`."""
        if self.values is not None:
            return self.values.num_bytes(shape, itemsize)
        heads, tokens, dim = shape
        return heads * tokens * dim * itemsize

    def coded_layers(self, prefix: Prefix) -> list[int]:
        """Indices of the layers that are coded: those with full attention, less what it skips."""
        return prefix.full_layers

    def memory(self, prefix: Prefix, itemsize: int | None = None) -> KeyMemory:
        """Memory of the keys of a context, from its shapes alone.

        Parameters
        ----------
        itemsize : bytes of an exact number; None for those of the cache's dtype.
        """
        itemsize = itemsize or prefix.itemsize
        coded = self.coded_layers(prefix)
        return total_memory(
            self.layer_memory(shape, itemsize) if layer in coded else _exact(shape, itemsize)
            for layer, shape in zip(prefix.full_layers, prefix.key_shapes, strict=True)
        )

    def cache_bytes(self, prefix: Prefix, itemsize: int) -> int:
        """Bytes of the whole cache of a context, exact numbers of ``itemsize`` bytes."""
        total = full_cache_bytes(prefix.cache, itemsize=itemsize)
        layers = prefix.cache.layers
        total -= sum(layers[i].keys.numel() for i in prefix.full_layers) * itemsize
        total += self.memory(prefix, itemsize).key_bytes
        for layer in self.coded_layers(prefix):
            values = layers[layer].values
            total += self.value_bytes(tuple(values.shape[1:]), itemsize) - values.numel() * itemsize
        return total

    def compress(self, prefix: Prefix) -> DynamicCache:
        """A cache with keys and values as they come back from their codes."""
        memory = self.memory(prefix)
        coded = self.coded_layers(prefix)
        cache = fork(prefix.cache, {layer: self.code_layer(prefix, layer) for layer in coded})
        for layer in coded:
            cache.layers[layer].values = self.code_values(prefix.cache.layers[layer].values)
        cache_bytes = self.cache_bytes(prefix, prefix.itemsize)
        full_bf16 = full_cache_bytes(prefix.cache, itemsize=BF16_BYTES)
        # A peer's cache is a simulation: it cannot be asked for its bytes, so they travel with it.
        cache.peer_columns = {
            "k_bits": memory.k_bits,
            "all_in_bits": memory.all_in_bits,
            "cache_bytes": cache_bytes,
            "cache_ratio": full_cache_bytes(prefix.cache) / cache_bytes,
            "times_smaller_bf16": full_bf16 / self.cache_bytes(prefix, BF16_BYTES),
        }
        return cache

    def columns(self) -> dict:
        """Columns of the settings in a row of results."""
        v_bits = "exact" if self.v_bits is None else self.v_bits
        return {"method": self.label, "v_bits": v_bits} | self.settings()

    def memory_columns(self, cache: DynamicCache) -> dict:
        """Memory of the context that a cache of this method was made from."""
        return dict(cache.peer_columns)


def _exact(shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
    """Memory of the keys of a layer that is not coded."""
    heads, tokens, dim = shape
    return KeyMemory(0, 0, heads * tokens * dim * itemsize, heads * tokens * dim)


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
            "times_smaller_bf16": 1.0,
        }
