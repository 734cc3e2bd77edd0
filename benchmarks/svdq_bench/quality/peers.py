"""Other ways to shrink a key cache, on the same exact keys, with the bytes they would take.

Every peer quantizes the rotated keys of the full-attention layers and puts the dequantized numbers
into a ``DynamicCache``: what the model computes from it is what a kernel would compute from the
codes. Sliding-window layers and values stay exact. Bytes are those of an implementation that packs
codes without gaps, holds scale and minimum of a group as two 16-bit numbers (to which they are
rounded here, too) and exact tokens in the model's dtype; tests build such arrays and count them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from svdq_bench.quality.key_memory import KeyMemory, total_memory
from svdq_bench.quality.memory import full_cache_bytes
from svdq_bench.quality.prefix import Prefix, fork

SCALE_PAIR_BYTES = 4


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


@dataclass(frozen=True)
class PerChannel(Peer):
    """Asymmetric codes with one range from min to max for each channel of a head.

    Bytes of a layer with n = T - sink_tokens: ``ceil(H D n bits / 8) + 4 H D`` and the sinks.

    Parameters
    ----------
    bits : of a code, 1 to 8.
    sink_tokens : leading tokens that stay exact.
    """

    bits: int
    sink_tokens: int = 8

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_counts(sink_tokens=self.sink_tokens)

    @property
    def label(self) -> str:
        """The settings in a few words."""
        return f"per-channel {self.bits}-bit"

    def settings(self) -> dict:
        """Columns that name the settings."""
        return {"family": "per-channel", "bits": self.bits, "sink_tokens": self.sink_tokens}

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Round every channel's numbers to its range."""
        out = keys.clone()
        coded = keys[:, :, self.sink_tokens :]
        out[:, :, self.sink_tokens :] = round_to_range(coded, self.bits)
        return out

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """See :class:`PerChannel`."""
        heads, tokens, dim = shape
        coded = tokens - self.sink_tokens
        _check_coded(self.label, tokens, coded)
        return _memory(shape, itemsize, coded, self.bits, heads * dim * SCALE_PAIR_BYTES)


@dataclass(frozen=True)
class Kivi(Peer):
    """KIVI's keys (arXiv 2402.02750): a range for each channel and group of consecutive tokens.

    Tokens that do not fill a group stay exact. Bytes of a layer with g whole groups:
    ``ceil(H D g group_size bits / 8) + 4 H D g`` and the exact tokens.

    Parameters
    ----------
    bits : of a code, 1 to 8.
    group_size : tokens of a group.
    residual : last tokens that stay exact at least.
    sink_tokens : leading tokens that stay exact; KIVI itself keeps none.
    """

    bits: int
    group_size: int = 32
    residual: int = 0
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_counts(residual=self.residual, sink_tokens=self.sink_tokens)
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    @property
    def label(self) -> str:
        """The settings in a few words."""
        return f"KIVI {self.bits}-bit, groups of {self.group_size}"

    def settings(self) -> dict:
        """Columns that name the settings."""
        return {
            "family": "kivi",
            "bits": self.bits,
            "group_size": self.group_size,
            "residual_length": self.residual,
            "sink_tokens": self.sink_tokens,
        }

    def _groups(self, tokens: int) -> int:
        return max(tokens - self.sink_tokens - self.residual, 0) // self.group_size

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Round the numbers of every channel and group to their range."""
        groups = self._groups(keys.shape[2])
        coded = slice(self.sink_tokens, self.sink_tokens + groups * self.group_size)
        out = keys.clone()
        grouped = keys[:, :, coded].unflatten(2, (groups, self.group_size))
        out[:, :, coded] = round_to_range(grouped, self.bits).flatten(2, 3)
        return out

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """See :class:`Kivi`."""
        heads, tokens, dim = shape
        groups = self._groups(tokens)
        _check_coded(self.label, tokens, groups)
        pair_bytes = groups * heads * dim * SCALE_PAIR_BYTES
        return _memory(shape, itemsize, groups * self.group_size, self.bits, pair_bytes)


@dataclass(frozen=True)
class ThinK(Peer):
    """ThinK (arXiv 2407.21018): channels of a head that matter little to its queries are dropped.

    Kept are the channels with the largest ``||q_d|| ||k_d||``, norms over all tokens; the others
    read as zero. Bytes of a layer with n = T - sink_tokens and m channels kept: ``H n m`` exact
    numbers, ``H ceil(D / 8)`` bytes of masks, and the sinks.

    Parameters
    ----------
    kept : share of the channels that stays, above 0; at least one channel does.
    sink_tokens : leading tokens that keep all channels.
    """

    kept: float
    sink_tokens: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise ValueError(f"the share of channels kept must be in (0, 1], got {self.kept}")
        _check_counts(sink_tokens=self.sink_tokens)

    @property
    def label(self) -> str:
        """The settings in a few words."""
        return f"ThinK, {100 * self.kept:.3g} % of channels"

    def settings(self) -> dict:
        """Columns that name the settings."""
        return {"family": "think", "kept": self.kept, "sink_tokens": self.sink_tokens}

    def _channels(self, dim: int) -> int:
        return max(round(self.kept * dim), 1)

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Put zeros into the channels that are dropped."""
        coded = keys[0, :, self.sink_tokens :]
        # Squares order channels as the norms do.
        score = query_energy * coded.float().square().mean(dim=1)
        best = score.topk(self._channels(keys.shape[-1]), dim=-1).indices
        mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
        out = keys.clone()
        out[0, :, self.sink_tokens :] = coded * mask[:, None]
        return out

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """See :class:`ThinK`; a coded number takes ``m / D`` of an exact one."""
        heads, tokens, dim = shape
        coded = tokens - self.sink_tokens
        _check_coded(self.label, tokens, coded)
        numbers = heads * coded * self._channels(dim)
        masks = heads * -(-dim // 8)
        exact = heads * self.sink_tokens * dim
        return KeyMemory(
            8 * itemsize * numbers,
            heads * coded * dim,
            (numbers + exact) * itemsize + masks,
            heads * tokens * dim,
        )


def round_to_range(x: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize with one range along the last but one dimension, from min to max.

    Scale and minimum are rounded to float16, as they are stored.

    Parameters
    ----------
    x : [..., n, D]; D channels of n numbers each share a range.
    """
    numbers = x.float()
    low = numbers.amin(dim=-2, keepdim=True).half().float()
    high = numbers.amax(dim=-2, keepdim=True)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float()
    if not bool(low.isfinite().all() & scale.isfinite().all()):
        raise ValueError("keys are not all numbers within the range of float16")
    codes = ((numbers - low) / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return (codes.clamp(0, top) * scale + low).to(x.dtype)


def _memory(
    shape: tuple[int, int, int], itemsize: int, coded: int, bits: int, pair_bytes: int
) -> KeyMemory:
    """Codes of ``coded`` tokens, their scale pairs, and the other tokens exact."""
    heads, tokens, dim = shape
    code_bits = heads * coded * dim * bits
    exact_bytes = heads * (tokens - coded) * dim * itemsize
    key_bytes = -(-code_bits // 8) + pair_bytes + exact_bytes
    return KeyMemory(code_bits, heads * coded * dim, key_bytes, heads * tokens * dim)


def _check_bits(bits: int) -> None:
    if bits not in range(1, 9):
        raise ValueError(f"bits must be 1 .. 8, got {bits}")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")


def _check_coded(label: str, tokens: int, coded: int) -> None:
    if coded < 1:
        raise ValueError(f"{label}: nothing is coded of {tokens} tokens, the exact ones are all")
