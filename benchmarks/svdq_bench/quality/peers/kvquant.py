"""KVQuant's idea without its offline calibration: non-uniform levels, and exact outliers.

It differs from the paper (arXiv 2401.18079) in what can only be known offline: levels, ranges and
outliers come from the context that is coded, and errors are weighted by the energy of the context's
queries instead of by gradients. Q-Norm corrects levels that were made for other data, so there is
none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq.hf.rope import inverse_frequencies
from svdq.reference.keys import rotate
from svdq_bench.quality.key_memory import KeyMemory
from svdq_bench.quality.peers.base import Peer
from svdq_bench.quality.peers.rounding import (
    SCALE_PAIR_BYTES,
    check_bits,
    check_coded,
    check_counts,
    code_memory,
)
from svdq_bench.quality.peers.values import values_suffix
from svdq_bench.quality.prefix import Prefix

NUMBER_BYTES = 2  # of an outlier and of a level, both float16
BINS = 4096
ROUNDS = 200


@dataclass(frozen=True)
class KVQuant(Peer):
    """Non-uniform levels shared by a layer, in a range of each vector; outliers apart.

    A vector of keys is a channel of all coded tokens, a vector of values is a token of all KV
    heads. Of each vector a fixed share of the numbers, half of them the smallest and half the
    largest, is held in float16 with its index; the others span the vector's range. Levels are one
    set for the keys of a layer and one for its values, by weighted k-means in units of the range.

    Bytes of V vectors of N numbers, k of each outliers: ``ceil(V N bits / 8) + 4 V`` (range),
    ``V k (2 + 2)`` (number and 16-bit index; 32 bits above 65,536 numbers), ``2 * 2^bits`` (levels)
    and the exact tokens. All vectors have as many outliers, so there are no row pointers.

    Parameters
    ----------
    bits : of a code, 1 to 8.
    rope : ``"pre"`` to code un-rotated keys, as the paper does, ``"post"`` for rotated ones.
    sink_tokens : leading tokens that stay exact.
    v_bits : of a value; None for exact values.
    outliers : share of a vector's numbers.
    """

    bits: int
    rope: str = "pre"
    sink_tokens: int = 8
    v_bits: int | None = None
    outliers: float = 0.01

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_counts(sink_tokens=self.sink_tokens)
        if self.v_bits is not None:
            check_bits(self.v_bits, "v_bits")
        if self.rope not in ("pre", "post"):
            raise ValueError(f"rope must be 'pre' or 'post', got {self.rope!r}")
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"the share of outliers must be in [0, 0.5), got {self.outliers}")

    @property
    def label(self) -> str:
        """The settings in a few words."""
        share = f"{100 * self.outliers:g} % outliers, {self.rope}-RoPE"
        return f"KVQuant-style {self.bits}-bit, {share}{values_suffix(self.v_bits)}"

    def settings(self) -> dict:
        """Columns that name the settings."""
        return {
            "family": "kvquant",
            "bits": self.bits,
            "rope": self.rope,
            "outliers": self.outliers,
            "sink_tokens": self.sink_tokens,
        }

    def code_layer(self, prefix: Prefix, layer: int) -> Tensor:
        """Keys [1, H, T, D] of a layer, un-rotated before they are coded unless ``rope="post"``."""
        keys, energy = prefix.cache.layers[layer].keys, prefix.query_energy[layer]
        inv_freq = None
        if self.rope == "pre":
            config = prefix.config.get_text_config(decoder=True)
            inv_freq = inverse_frequencies(config, layer, prefix.num_tokens - 1)
        if inv_freq is None:
            return self.code(keys, energy)
        inv_freq, positions = inv_freq.to(keys.device), torch.arange(keys.shape[2]).to(keys.device)
        unrotated = rotate(keys, positions, inv_freq, inverse=True).float()
        found = rotate(self.code(unrotated, pair_means(energy, len(inv_freq))), positions, inv_freq)
        out = keys.clone()
        out[:, :, self.sink_tokens :] = found[:, :, self.sink_tokens :].to(keys.dtype)
        return out

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Code every channel, its errors weighted by the energy of its queries."""
        coded = keys[0, :, self.sink_tokens :]
        vectors = coded.mT.flatten(0, 1)  # [H D, n]
        found = code_vectors(vectors, query_energy.flatten(), self.bits, self.outliers)
        out = keys.clone()
        out[0, :, self.sink_tokens :] = found.view(*coded.mT.shape).mT
        return out

    def code_values(self, values: Tensor) -> Tensor:
        """Code every token, all KV heads together; all errors weigh the same."""
        if self.v_bits is None:
            return values
        coded = values[0, :, self.sink_tokens :].transpose(0, 1)  # [n, H, D]
        weights = torch.ones(len(coded), device=values.device)
        found = code_vectors(coded.flatten(1), weights, self.v_bits, self.outliers)
        out = values.clone()
        out[0, :, self.sink_tokens :] = found.view(coded.shape).transpose(0, 1)
        return out

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """See :class:`KVQuant`."""
        heads, tokens, dim = shape
        coded = tokens - self.sink_tokens
        check_coded(self.label, tokens, coded)
        other_bytes = self._other_bytes(heads * dim, coded, self.bits)
        return code_memory(shape, itemsize, coded, self.bits, other_bytes)

    def value_bytes(self, shape: tuple[int, int, int], itemsize: int) -> int:
        """See :class:`KVQuant`."""
        if self.v_bits is None:
            return super().value_bytes(shape, itemsize)
        heads, tokens, dim = shape
        coded = tokens - self.sink_tokens
        codes = -(-coded * heads * dim * self.v_bits // 8)
        other_bytes = self._other_bytes(coded, heads * dim, self.v_bits)
        return codes + other_bytes + heads * self.sink_tokens * dim * itemsize

    def _other_bytes(self, vectors: int, length: int, bits: int) -> int:
        """Bytes of ranges, outliers and levels."""
        index_bytes = 2 if length <= 1 << 16 else 4
        outlier_bytes = sum(outlier_counts(length, self.outliers)) * (NUMBER_BYTES + index_bytes)
        return vectors * (SCALE_PAIR_BYTES + outlier_bytes) + NUMBER_BYTES * 2**bits


def pair_means(energy: Tensor, rotary_pairs: int) -> Tensor:
    """Energies [H, D] of rotated channels as those of un-rotated ones: means over RoPE pairs."""
    first, second, rest = energy.tensor_split((rotary_pairs, 2 * rotary_pairs), dim=-1)
    mean = (first + second) / 2
    return torch.cat([mean, mean, rest], dim=-1)


def outlier_counts(length: int, share: float) -> tuple[int, int]:
    """How many of a vector's numbers are outliers, of the smallest and of the largest."""
    count = round(share * length)
    return count // 2, count - count // 2


def code_vectors(x: Tensor, weights: Tensor, bits: int, outliers: float) -> Tensor:
    """Vectors [V, N] as they come back from shared levels, own ranges and exact outliers.

    Parameters
    ----------
    weights : [V], of the squared errors of a vector.
    """
    numbers = x.float()
    smallest, largest = outlier_counts(x.shape[1], outliers)
    order = numbers.argsort(dim=1)
    apart = torch.zeros_like(numbers, dtype=torch.bool)
    apart.scatter_(1, order[:, :smallest], True)
    apart.scatter_(1, order[:, x.shape[1] - largest :], True)
    low = numbers.masked_fill(apart, torch.inf).amin(1, keepdim=True).half().float()
    high = numbers.masked_fill(apart, -torch.inf).amax(1, keepdim=True)
    span = (high - low).half().float()
    stored = numbers.half().float()
    if not bool(low.isfinite().all() & span.isfinite().all() & stored.isfinite().all()):
        raise ValueError("there are numbers that are not within the range of float16")
    unit = ((numbers - low) / span.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)
    number_weights = torch.where(apart, 0, weights.float()[:, None] * span.square())
    levels = fit_levels(unit, number_weights, bits).half().float()
    codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
    return torch.where(apart, stored, levels[codes] * span + low).to(x.dtype)


def fit_levels(unit: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Levels of least weighted squared error by Lloyd's iteration: [2^bits] float32, ascending.

    Numbers are counted in ``BINS`` bins first. Levels start where the cube root of their density
    has equal shares, which is right for many levels.

    Parameters
    ----------
    unit, weights : any shape, numbers in [0, 1] and their weights.
    """
    bins = (unit.double() * BINS).long().clamp(0, BINS - 1).flatten()
    flat = weights.double().flatten()
    mass = torch.bincount(bins, flat, BINS)
    moment = torch.bincount(bins, flat * unit.double().flatten(), BINS)
    shares = mass.pow(1 / 3).cumsum(0)
    wanted = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits * shares[-1].cpu()
    centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    levels = centers[torch.searchsorted(shares.cpu(), wanted).clamp_max(BINS - 1)]
    mass, moment = (torch.cat([x.new_zeros(1), x.cumsum(0)]).cpu() for x in (mass, moment))
    for _ in range(ROUNDS):
        edges = ((levels[1:] + levels[:-1]) / 2 * BINS).round().long()
        edges = torch.cat([edges.new_tensor([0]), edges, edges.new_tensor([BINS])])
        own = mass[edges].diff()
        moved = torch.where(own > 0, moment[edges].diff() / own.clamp_min(1e-300), levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels.sort().values.float().to(unit.device)
