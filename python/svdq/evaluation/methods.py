"""The caches under test: how they are asked for, made and described."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PretrainedConfig, PreTrainedModel

from svdq.cache import SVDqCache
from svdq.layout import PAGE_TOKENS
from svdq.presets import PRESETS, Schedule, resolve_schedule

if TYPE_CHECKING:
    from svdq.evaluation.prefix import Prefix


def parse_schedule(keys: str) -> Schedule | None:
    """Bits per group of channels from a preset, its bits ("1.25") or a schedule ("4,4,2,0").

    None stands for exact keys.
    """
    return resolve_schedule(**_schedule_argument(keys))


def _schedule_argument(keys: str) -> dict:
    """The argument of ``SVDqCache`` that a user's words mean."""
    if keys in PRESETS:
        return {"preset": keys}
    if re.fullmatch(r"\d+(\.\d+)?", keys):
        return {"k_bits": float(keys)}
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)+", keys):
        return {"schedule": tuple(int(width) for width in keys.split(","))}
    raise ValueError(
        f"key bits must be a preset ({', '.join(PRESETS)}), the bits of one, or a schedule like "
        f"4,4,2,0,0,0,0,0; got {keys!r}"
    )


def _parse_value_bits(bits: str | int) -> int | str:
    text = str(bits)
    if text == "exact":
        return text
    if not text.isdigit():
        raise ValueError(f"value bits must be 4, 2, 16, 32 or 'exact', got {bits!r}")
    return int(text)


@dataclass(frozen=True)
class CacheSettings:
    """One :class:`svdq.SVDqCache` to test.

    Parameters
    ----------
    keys : what the user asked for: a preset, bits or a schedule, see :func:`parse_schedule`.
    v_bits, rope, clip, sink_tokens, residual_length : as for the cache.
    """

    keys: str
    v_bits: int | str = 4
    rope: str = "pre"
    clip: bool = True
    sink_tokens: int = 8
    residual_length: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_bits", _parse_value_bits(self.v_bits))
        parse_schedule(self.keys)
        if not 0 <= self.sink_tokens <= PAGE_TOKENS:
            raise ValueError(f"sink_tokens must be 0 .. {PAGE_TOKENS}, got {self.sink_tokens}")

    @property
    def label(self) -> str:
        """The settings in a few words."""
        ranges = "clipped" if self.clip else "min-max"
        return f"svdq {self.keys}, {self.rope}-RoPE, {ranges}"

    def make_cache(self, config: PretrainedConfig) -> SVDqCache:
        """A new, empty cache."""
        v_bits = None if parse_schedule(self.keys) is None else self.v_bits
        return SVDqCache(
            config,
            **_schedule_argument(self.keys),
            v_bits=v_bits,
            rope=self.rope,
            clip=self.clip,
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
        )

    @property
    def implementation(self) -> str:
        """The attention that reads these caches."""
        return "svdq"

    def compress(self, prefix: Prefix) -> SVDqCache:
        """A new cache of a context that was read exactly."""
        cache = self.make_cache(prefix.config)
        cache.prefill_from(prefix.cache)
        return cache

    def columns(self) -> dict:
        """What a row of results says about the settings."""
        return {
            "method": self.label,
            "preset": self.keys,
            "rope": self.rope,
            "clip": self.clip,
            "v_bits": self.v_bits,
            "sink_tokens": self.sink_tokens,
            "residual_length": self.residual_length,
        }

    def bits(self, cache: SVDqCache) -> dict[str, float]:
        """Bits per key number of a filled cache: the codes alone, and all that keys take.

        Raises
        ------
        ValueError
            If the cache was to pack keys and has not, so that its scores would be those of exact
            keys.
        """
        report = cache.memory_report()
        if parse_schedule(self.keys) is None:
            return {"k_bits": report.key_bits, "all_in_bits": report.key_bits}
        if report.packed_numbers == 0:
            raise ValueError(
                f"nothing was packed: {report.tokens} tokens are too few to fit a basis"
            )
        return {"k_bits": report.code_bits, "all_in_bits": report.key_bits}

    def memory_columns(self, cache: SVDqCache) -> dict[str, float]:
        """Bits as :meth:`bits`, bytes of the whole cache and their ratio to the full cache's."""
        report = cache.memory_report()
        return self.bits(cache) | {
            "cache_bytes": report.total_bytes,
            "cache_ratio": report.ratio,
            "cache_parts": report.parts,
        }


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
