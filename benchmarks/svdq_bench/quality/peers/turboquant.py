"""TurboQuant as vLLM ships it: rotated keys by the levels of a normal variable.

The facts are those of vLLM's ``turboquant_*`` cache types: one Hadamard rotation without random
signs, no QJL part, uniform values, and the model's first and last layers left alone.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_bench.quality.key_memory import KeyMemory
from svdq_bench.quality.peers.base import Peer
from svdq_bench.quality.peers.rounding import check_coded, check_counts, code_memory
from svdq_bench.quality.prefix import Prefix

# vLLM's cache type -> bits of keys (8: float8) and of values, and whether norms are corrected.
PRESETS = {
    "k8v4": (8, 4, False),
    "4bit_nc": (4, 4, True),
    "k3v4_nc": (3, 4, True),
    "3bit_nc": (3, 3, True),
}
NORM_BYTES = 2
VALUE_PAIR_BYTES = 4
FLOAT8_MAX = 448.0
SMALLEST_SCALE = 1e-8  # of values, and what vLLM adds to a norm before it divides by it


@dataclass(frozen=True)
class TurboQuant(Peer):
    """vLLM's ``turboquant_PRESET``.

    A key is divided by its norm (float16), rotated by a Hadamard matrix, and each number rounded to
    the Lloyd-Max levels of a normal variable of variance ``1 / D``. With norm correction the levels
    of a key are scaled to norm 1 before they are multiplied by its norm. Eight-bit keys are
    float8 (e4m3) numbers as they are. Values have one range a token and head, from minimum to
    maximum, with scale and minimum in float16.

    Bytes of a token and head: ``ceil(D k_bits / 8) + 2`` for a key (``D`` in float8) and
    ``ceil(D v_bits / 8) + 4`` for a value, together rounded up to an even number. Block tables are
    not counted, nor the last block's free slots.

    Parameters
    ----------
    preset : one of :data:`PRESETS`.
    skipped_layers : layers at either end of the model that stay exact; vLLM's number is 2.
    sink_tokens : leading tokens that stay exact; vLLM keeps none.
    """

    preset: str
    skipped_layers: int = 2
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"TurboQuant has {', '.join(PRESETS)}, got {self.preset!r}")
        check_counts(skipped_layers=self.skipped_layers, sink_tokens=self.sink_tokens)

    @property
    def bits(self) -> int:
        """Bits of a key number."""
        return PRESETS[self.preset][0]

    @property
    def v_bits(self) -> int:
        """Bits of a value."""
        return PRESETS[self.preset][1]

    @property
    def label(self) -> str:
        """The settings in a few words."""
        layers = "" if self.skipped_layers == 2 else f", {self.skipped_layers} exact layers an end"
        sinks = f", {self.sink_tokens} sinks" if self.sink_tokens else ""
        return f"TurboQuant {self.preset}{layers}{sinks}"

    def settings(self) -> dict:
        """Columns that name the settings."""
        return {
            "family": "turboquant",
            "bits": self.bits,
            "skipped_layers": self.skipped_layers,
            "sink_tokens": self.sink_tokens,
        }

    def coded_layers(self, prefix: Prefix) -> list[int]:
        """All but the model's first and last layers, of a model with few layers none.

        Raises
        ------
        ValueError
            If none is left.
        """
        first, end = self.skipped_layers, len(prefix.cache.layers) - self.skipped_layers
        coded = [layer for layer in prefix.full_layers if first <= layer < end]
        if not coded:
            raise ValueError(f"{self.label}: no layer is coded of {len(prefix.cache.layers)}")
        return coded

    def code(self, keys: Tensor, query_energy: Tensor) -> Tensor:
        """Rotate unit keys, round them to the levels, and rotate back."""
        out = keys.clone()
        coded = keys[:, :, self.sink_tokens :].float()
        if self.bits == 8:
            found = coded.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float()
        else:
            found = self._code_rotated(coded)
        out[:, :, self.sink_tokens :] = found.to(keys.dtype)
        return out

    def _code_rotated(self, keys: Tensor) -> Tensor:
        """Keys [..., D] float32 as they come back from levels and norms."""
        dim = keys.shape[-1]
        rotation = hadamard(dim).to(keys.device)
        norms = keys.norm(dim=-1, keepdim=True)
        rotated = keys / (norms + SMALLEST_SCALE) @ rotation
        levels = normal_levels(self.bits).to(keys) / math.sqrt(dim)
        found = levels[torch.bucketize(rotated, (levels[1:] + levels[:-1]) / 2, right=True)]
        if PRESETS[self.preset][2]:
            found = found / found.norm(dim=-1, keepdim=True)
        return found @ rotation * norms.half().float()

    def code_values(self, values: Tensor) -> Tensor:
        """Round each token of a head to its range; codes are made before the range is rounded."""
        out = values.clone()
        coded = values[:, :, self.sink_tokens :].float()
        low, high = coded.amin(-1, keepdim=True), coded.amax(-1, keepdim=True)
        top = 2**self.v_bits - 1
        scale = ((high - low) / top).clamp_min(SMALLEST_SCALE)
        codes = ((coded - low) / scale + 0.5).floor().clamp(0, top)
        found = codes * scale.half().float() + low.half().float()
        out[:, :, self.sink_tokens :] = found.to(values.dtype)
        return out

    def _key_bytes(self, dim: int) -> int:
        """Bytes of a coded key of a head."""
        return dim if self.bits == 8 else -(-dim * self.bits // 8) + NORM_BYTES

    def layer_memory(self, shape: tuple[int, int, int], itemsize: int) -> KeyMemory:
        """See :class:`TurboQuant`; the byte that makes a slot even counts as a value's."""
        heads, tokens, dim = shape
        rows = heads * (tokens - self.sink_tokens)
        check_coded(self.label, tokens, rows)
        codes = -(-rows * dim * self.bits // 8)
        other_bytes = rows * self._key_bytes(dim) - codes
        return code_memory(shape, itemsize, rows // heads, self.bits, other_bytes)

    def value_bytes(self, shape: tuple[int, int, int], itemsize: int) -> int:
        """See :class:`TurboQuant`."""
        heads, tokens, dim = shape
        size = -(-dim * self.v_bits // 8) + VALUE_PAIR_BYTES
        size += (self._key_bytes(dim) + size) % 2
        exact = heads * self.sink_tokens * dim * itemsize
        return heads * (tokens - self.sink_tokens) * size + exact


@functools.cache
def hadamard(dim: int) -> Tensor:
    """Sylvester's Hadamard matrix [dim, dim] float32, orthonormal and symmetric.

    Raises
    ------
    ValueError
        If ``dim`` is no power of two.
    """
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"a Hadamard rotation needs a head_dim that is a power of 2, got {dim}")
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(dim)


@functools.cache
def normal_levels(bits: int) -> Tensor:
    """Lloyd-Max levels of a standard normal variable: [2^bits] float64, ascending.

    Each level is the mean of the variable between the midpoints to its neighbours.
    """
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    change = 1.0
    while change > 1e-12:
        edges = torch.cat([levels.new_tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2])
        edges = torch.cat([edges, levels.new_tensor([math.inf])])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        before, levels = levels, -density.diff() / mass
        change = float((levels - before).abs().max())
    return levels
