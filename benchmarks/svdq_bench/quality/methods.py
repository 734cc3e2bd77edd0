"""The caches under test: how they are asked for, made and described."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from svdq import Calibration
from svdq.cache.cache import SVDqCache
from svdq.config.presets import PRESETS, Schedule, resolve_keys
from svdq.config.sparsity import DEFAULT_CHANNELS, Sparsity
from svdq.layout import PAGE_TOKENS
from svdq_bench.quality.budgets import budget_text
from svdq_bench.quality.memory import bf16_bytes

if TYPE_CHECKING:
    from svdq_bench.quality.prefix import Method, Prefix


def parse_schedule(keys: str) -> Schedule | None:
    """Bits per group of channels from a preset or a schedule ("4,4,2,0"); None for exact keys.

    Raises
    ------
    ValueError
        For bits that are to be allocated, which only keys can say.
    """
    argument = key_argument(keys)
    schedule, k_bits = resolve_keys(**argument)
    if k_bits is not None or argument.keys() & {"lambda_", "kv_bits"}:
        raise ValueError(f"expected a preset ({', '.join(PRESETS)}) or a schedule, got {keys!r}")
    return schedule


def key_argument(keys: str) -> dict:
    """The argument of ``SVDqCache`` that a user's words mean: a preset, a schedule ("4,4,2,0"), an
    average to allocate ("0.7"), one of keys and values together ("kv=2") or a price
    ("lambda=0.01")."""
    if keys in PRESETS:
        return {"preset": keys}
    if re.fullmatch(r"\d+(\.\d+)?", keys):
        return {"k_bits": float(keys)}
    if match := re.fullmatch(r"kv=(\d+(\.\d+)?)", keys):
        return {"kv_bits": float(match[1])}
    if match := re.fullmatch(r"lambda=(\d+(\.\d+)?(e-?\d+)?)", keys):
        return {"lambda_": float(match[1])}
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)+", keys):
        return {"schedule": tuple(int(width) for width in keys.split(","))}
    raise ValueError(
        f"key bits must be a preset ({', '.join(PRESETS)}), an average to allocate like 0.7, one "
        f"of keys and values like kv=2, a price like lambda=0.01, or a schedule like "
        f"4,4,2,0,0,0,0,0; got {keys!r}"
    )


def parse_value_bits(bits: str | float) -> float | str:
    """Bits of values in a user's words: a number, an average, or "exact"."""
    text = str(bits)
    if text == "exact":
        return text
    if re.fullmatch(r"[23]\.\d+", text):
        return float(text)
    if not text.isdigit():
        raise ValueError(
            f"value bits must be 4, 3, 2, between them, 16, 32 or 'exact', got {bits!r}"
        )
    return int(text)


@dataclass(frozen=True)
class CacheSettings:
    """One :class:`svdq.SVDqCache` to test.

    Parameters
    ----------
    keys : what the user asked for, see :func:`key_argument`.
    allocate_across, query_weighted, profile, outlier_fraction : as for the cache.
    calibration, prompt_ranges : likewise; then ``keys`` and what follows them are calibrated.
    v_bits, rope, clip, sink_tokens, residual_length : as for the cache.
    sparse_budget, sparse_scorer, sparse_channels : as for the cache; one budget for all layers.
    dense_layers : first layers of the model that have no budget.
    one_by_one : feed what follows the context in steps of one token, which alone are sparse, so
        that caches with and without a budget are compared under the same conditions.
    """

    keys: str
    v_bits: float | str = 4
    rope: str = "pre"
    clip: bool = True
    sink_tokens: int = 8
    residual_length: int = 64
    allocate_across: str = "model"
    query_weighted: bool | None = None
    profile: str | None = None
    outlier_fraction: float = 0.0
    calibration: Calibration | None = None
    prompt_ranges: bool = False
    sparse_budget: int | float | None = None
    sparse_scorer: str = "latent"
    sparse_channels: int = DEFAULT_CHANNELS
    dense_layers: int = 0
    one_by_one: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_bits", parse_value_bits(self.v_bits))
        resolve_keys(**key_argument(self.keys))
        if not 0 <= self.sink_tokens <= PAGE_TOKENS:
            raise ValueError(f"sink_tokens must be 0 .. {PAGE_TOKENS}, got {self.sink_tokens}")
        allocates = key_argument(self.keys).keys() & {"k_bits", "kv_bits"}
        if self.allocate_across != "model" and not allocates:
            raise ValueError(
                f"keys {self.keys!r} have no bits to allocate across each {self.allocate_across}"
            )
        average = isinstance(self.v_bits, float)
        if average and not key_argument(self.keys).keys() & {"k_bits"}:
            raise ValueError(
                f"value bits {self.v_bits} are an average, which keys {self.keys!r} do not allocate"
            )
        if self.query_weighted and not self.packs:
            raise ValueError(f"keys {self.keys!r} are not packed, so they cannot be weighted")
        if self.sparse_budget is not None:
            Sparsity(self.sparse_budget, self.sparse_scorer, self.sparse_channels)
            if not self.packs:
                raise ValueError(f"keys {self.keys!r} are not packed, so none can be left out")

    @property
    def packs(self) -> bool:
        """True if keys are packed at all."""
        argument = key_argument(self.keys)
        allocates = "lambda_" in argument or "kv_bits" in argument
        return allocates or resolve_keys(**argument) != (None, None)

    @property
    def allocates_both(self) -> bool:
        """True if one average holds for keys and values."""
        return "kv_bits" in key_argument(self.keys)

    @property
    def label(self) -> str:
        """The settings in a few words."""
        ranges = "clipped" if self.clip else "min-max"
        words = [f"svdq {self.keys}", f"{self.rope}-RoPE", ranges]
        if self.allocate_across != "model":
            words.append(f"per {self.allocate_across}")
        if self.query_weighted is not None:
            words.append("weighted" if self.query_weighted else "unweighted")
        if self.profile is not None:
            words.append("by profile")
        if self.calibration is not None:
            words.append("calibrated" + (", own ranges" if self.prompt_ranges else ""))
        if self.outlier_fraction:
            words.append(f"{100 * self.outlier_fraction:g} % outliers")
        if self.sparse_budget is not None:
            latent = self.sparse_scorer == "latent"
            scorer = f"{self.sparse_channels} channels" if latent else self.sparse_scorer
            words.append(f"{budget_text(self.sparse_budget)} by {scorer}")
            if self.dense_layers:
                words.append(f"{self.dense_layers} dense layers")
        return ", ".join(words)

    def make_cache(self, config: PretrainedConfig) -> SVDqCache:
        """A new, empty cache."""
        if self.calibration is not None:
            return SVDqCache(
                config,
                calibration=self.calibration,
                sink_tokens=self.sink_tokens,
                residual_length=self.residual_length,
                prompt_ranges=self.prompt_ranges,
                sparse_budget=self._layer_budgets(config),
                sparse_scorer=self.sparse_scorer,
                sparse_channels=self.sparse_channels,
            )
        v_bits = self.v_bits if self.packs and not self.allocates_both else None
        return SVDqCache(
            config,
            **key_argument(self.keys),
            v_bits=v_bits,
            rope=self.rope,
            clip=self.clip,
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
            allocate_across=self.allocate_across,
            query_weighted=self.query_weighted,
            profile=self.profile,
            outlier_fraction=self.outlier_fraction,
            sparse_budget=self._layer_budgets(config),
            sparse_scorer=self.sparse_scorer,
            sparse_channels=self.sparse_channels,
        )

    def _layer_budgets(
        self, config: PretrainedConfig
    ) -> int | float | None | list[int | float | None]:
        if self.sparse_budget is None or not self.dense_layers:
            return self.sparse_budget
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        if self.dense_layers >= num_layers:
            raise ValueError(
                f"dense_layers must be below the model's {num_layers} layers, got "
                f"{self.dense_layers}"
            )
        sparse = [self.sparse_budget] * (num_layers - self.dense_layers)
        return [None] * self.dense_layers + sparse

    @property
    def implementation(self) -> str:
        """The attention that reads these caches."""
        return "svdq"

    def compress(self, prefix: Prefix) -> SVDqCache:
        """A new cache of a context that was read exactly."""
        cache = self.make_cache(prefix.config)
        cache.prefill_from(prefix.cache, prefix.query_energy, prefix.samples, prefix.rules)
        return cache

    def columns(self) -> dict:
        """Columns of the settings in a row of results."""
        sparse = {}
        if self.sparse_budget is not None:
            sparse = {"budget": self.sparse_budget, "scorer": self.sparse_scorer}
            if self.sparse_scorer == "latent":
                sparse["channels"] = self.sparse_channels
            sparse["dense_layers"] = self.dense_layers
        return sparse | {
            "method": self.label,
            "preset": self.keys,
            "rope": self.rope,
            "clip": self.clip,
            "allocate_across": self.allocate_across,
            "query_weighted": self.query_weighted,
            "v_bits": None if self.allocates_both else self.v_bits,
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
        if not self.packs:
            return {"k_bits": report.key_bits, "all_in_bits": report.key_bits}
        if report.packed_numbers == 0:
            raise ValueError(
                f"nothing was packed: {report.tokens} tokens are too few to fit a basis"
            )
        return {"k_bits": report.code_bits, "all_in_bits": report.key_bits}

    def memory_columns(self, cache: SVDqCache) -> dict[str, float]:
        """Bits as :meth:`bits`, bytes of the whole cache and their ratio to the full cache's.

        ``times_smaller_bf16`` is that ratio if the model were a bfloat16 one and without what all
        prompts share, see :func:`svdq_bench.quality.memory.bf16_bytes`.
        """
        report = cache.memory_report()
        full_bf16, held_bf16 = bf16_bytes(cache)
        return self.bits(cache) | {
            "cache_bytes": report.total_bytes,
            "cache_ratio": report.ratio,
            "times_smaller_bf16": full_bf16 / held_bf16,
            "cache_parts": report.parts,
        }

    def read_columns(self, cache: SVDqCache) -> dict[str, float]:
        """Ratio of a full cache's bytes to those of the keys that the last step read.

        Returns
        -------
        code_read_ratio, read_ratio : codes alone and everything, see
            :class:`svdq.reads.ReadReport`; nothing where no step of one token was fed.
        """
        if not self.one_by_one or all(x.tokens.attended is None for x in cache.svdq_layers):
            return {}
        report = cache.read_report()
        return {"code_read_ratio": report.code_ratio, "read_ratio": report.ratio}


def feeds_one_by_one(method: Method) -> bool:
    """True if the text after the context is fed in steps of one token."""
    return isinstance(method, CacheSettings) and method.one_by_one


def read_columns(method: Method, cache: Cache) -> dict[str, float]:
    """Columns of :meth:`CacheSettings.read_columns`; peers have none."""
    return method.read_columns(cache) if isinstance(method, CacheSettings) else {}
