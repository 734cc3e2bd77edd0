"""transformers' own ``QuantizedCache`` as a method under test."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import QuantizedCache
from transformers.cache_utils import Cache

from svdq_bench.quality.memory import BF16_BYTES, full_cache_bytes
from svdq_bench.quality.prefix import Prefix

# Backend -> the module it needs, and how to install that.
PACKAGES = {
    "quanto": ("optimum.quanto", "pip install optimum-quanto"),
    "hqq": ("hqq", "pip install hqq"),
    "fp8": (None, ""),
}
BITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8), "fp8": (8,)}


@dataclass(frozen=True)
class TransformersQuantized:
    """``transformers.QuantizedCache``, which quantizes keys and values alike.

    It codes the whole context at once, then holds ``residual_length`` new tokens exact before it
    codes everything again. Bytes are counted on its own tensors.

    Parameters
    ----------
    backend : ``"quanto"``, ``"hqq"`` or ``"fp8"`` (transformers 5.24 and newer).
    bits : of keys and values; 8 for fp8.
    group_size : numbers that share a range, for the other two.
    """

    backend: str = "quanto"
    bits: int = 4
    group_size: int = 64

    implementation = None

    def __post_init__(self) -> None:
        if self.backend not in BITS:
            raise ValueError(
                f"QuantizedCache has the backends {', '.join(BITS)}, got {self.backend!r}"
            )
        if self.bits not in BITS[self.backend]:
            raise ValueError(
                f"QuantizedCache's {self.backend} takes {BITS[self.backend]} bits, got {self.bits}"
            )
        if not is_installed(self.backend):
            module, install = PACKAGES[self.backend]
            raise ImportError(
                f"QuantizedCache's backend {self.backend!r} needs {module}, which is not "
                f"installed; run '{install}'"
            )

    @property
    def label(self) -> str:
        """The settings in a few words."""
        if self.backend == "fp8":
            return "QuantizedCache fp8"
        return f"QuantizedCache {self.backend} {self.bits}-bit, groups of {self.group_size}"

    def columns(self) -> dict:
        """Columns of the settings in a row of results."""
        columns = {"method": self.label, "family": "quantized", "backend": self.backend}
        columns |= {"bits": self.bits, "v_bits": self.bits, "sink_tokens": 0}
        return columns if self.backend == "fp8" else columns | {"group_size": self.group_size}

    def compress(self, prefix: Prefix) -> QuantizedCache:
        """Feed the context's keys and values to a new cache, layer by layer."""
        options = {}
        if self.backend != "fp8":
            options = {"nbits": self.bits, "q_group_size": self.group_size}
        cache = _make_cache(self.backend, prefix.config, options)
        for index, layer in enumerate(prefix.cache.layers):
            cache.update(layer.keys, layer.values, index)
        # Its layers keep no shapes, so the size of the exact cache travels with it.
        cache.full_bytes = full_cache_bytes(prefix.cache)
        cache.full_bf16_bytes = full_cache_bytes(prefix.cache, itemsize=BF16_BYTES)
        cache.key_numbers = sum(layer.keys.numel() for layer in prefix.cache.layers)
        return cache

    def memory_columns(self, cache: QuantizedCache) -> dict:
        """Bytes of the tensors that the cache holds after :meth:`compress`."""
        key_bytes = sum(_stored_bytes(layer, "keys") for layer in cache.layers)
        value_bytes = sum(_stored_bytes(layer, "values") for layer in cache.layers)
        exact = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        saved = sum(x.numel() * (x.itemsize - BF16_BYTES) for x in exact)
        return {
            "k_bits": float(self.bits),
            "all_in_bits": 8 * key_bytes / cache.key_numbers,
            "cache_bytes": key_bytes + value_bytes,
            "cache_ratio": cache.full_bytes / (key_bytes + value_bytes),
            "times_smaller_bf16": cache.full_bf16_bytes / (key_bytes + value_bytes - saved),
        }


def is_installed(backend: str) -> bool:
    """True if the packages of a backend of ``QuantizedCache`` can be imported."""
    if backend == "fp8":
        return "fp8" in (inspect.getdoc(QuantizedCache) or "")
    try:
        return importlib.util.find_spec(PACKAGES[backend][0]) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def _make_cache(backend: str, config, options: dict) -> QuantizedCache:
    """A ``QuantizedCache`` whose errors say what was asked for.

    transformers refuses models with sliding-window layers, and packages of the wrong version.
    """
    try:
        return QuantizedCache(backend, config, **options)
    except (ImportError, ValueError) as error:
        raise type(error)(f"QuantizedCache, backend {backend!r}: {error}") from error


def _stored_bytes(layer: Cache, name: str) -> int:
    """Bytes of the codes, scales and exact tokens of a layer's keys or values."""
    exact = getattr(layer, name)
    coded = getattr(layer, f"_quantized_{name}")
    return exact.nbytes + sum(tensor.nbytes for tensor in _tensors(coded))


def _tensors(held) -> Iterator[Tensor]:
    """The plain tensors that a quantized tensor of any backend is made of.

    quanto wraps codes, scales and zero points into tensor subclasses with ``__tensor_flatten__``;
    hqq gives codes and a dictionary, fp8 codes and a scale.
    """
    if isinstance(held, Tensor):
        if type(held) is Tensor or not hasattr(held, "__tensor_flatten__"):
            yield held
            return
        names, _ = held.__tensor_flatten__()
        for name in names:
            yield from _tensors(getattr(held, name))
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, (tuple, list)):
        for value in held:
            yield from _tensors(value)
