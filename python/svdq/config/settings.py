"""Settings of a cache, validated, and the pages that follow from them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from svdq.config.bands import scheduled_bands
from svdq.config.presets import K_BITS, KV_BITS, resolve_keys
from svdq.config.sparsity import DEFAULT_CHANNELS, Sparsity
from svdq.layout import PAGE_TOKENS, ROPE_MODES, VALUE_BITS, WIDTHS, Bands, PageLayout

# The mode of the pages by the name in the settings: a rotated mean is a hybrid without pre-RoPE
# channels.
PAGE_ROPES = {mode: mode for mode in ROPE_MODES} | {"rotated-mean": "hybrid"}
SCOPES = ("model", "layer", "head")
V_BITS = (*VALUE_BITS, 16, 32, "exact")
PRE_BITS = 4  # of every pre-RoPE channel of a hybrid where bits are allocated
RENAMED = {"core_channels": "pre_channels"}  # settings of earlier versions
REMOVED = {"v_group_size": "values have one scale for each token of a head"}


def renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under today's names, without those that are no more."""
    kept = {name: value for name, value in settings.items() if name not in REMOVED}
    return {RENAMED.get(name, name): value for name, value in kept.items()}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the compression of a cache.

    At most one of ``preset``, ``schedule``, ``k_bits``, ``kv_bits`` and ``lambda_`` is given;
    without any, ``kv_bits`` is :data:`svdq.presets.KV_BITS`, or with ``v_bits`` alone ``k_bits`` is
    :data:`svdq.presets.K_BITS`. docs/evaluation.md has the tables that chose the defaults.
    Afterwards ``preset`` is None, except that it says ``"exact"`` where nothing is packed; any
    other preset has become its ``schedule``.

    Parameters
    ----------
    preset : name of a bit schedule in :data:`svdq.presets.PRESETS`: those of the paper, whose
        pages neither wait for other layers nor depend on other sequences; ``"exact"`` packs
        nothing.
    schedule : own bit schedule, widths of 8, 4, 2, 1, 0 per equal group of channels; instead of
        ``preset``.
    k_bits : code bits per key number on average, up to 8, allocated by water-filling; or 16 for
        exact keys and values. Instead of ``preset``. Where the average is over the model, a prompt
        stays exact until its last layer has been read.
    kv_bits : code bits per number of keys and values together on average, above 1 and at most 6,
        split between them, over layers and over heads by what they lose; instead of ``preset`` and
        ``v_bits``.
    lambda_ : price of a bit in squared units of attention score; instead of ``k_bits``. Layers are
        packed as they are read.
    allocate_across : scope of the average ``k_bits``: ``"model"``, each ``"layer"``, or each
        ``"head"``, whose pages are then equally large.
    query_weighted : fit bases in units of attention score, see svdq/fit/key_gain.py. True by
        default, unless a ``preset`` or ``schedule`` is named: those are the paper's.
    v_bits : 4 (the default where bits of keys are given), 3 or 2 bits a value; a number between
        them where key widths are allocated: an average over the same scope, by what each head
        loses; or exact: 16 or 32, whichever the model's dtype has, or ``"exact"`` for either.
    rope : keys to code. ``"pre"``: un-rotated (the paper, most accurate); ``"post"``: as they come
        (fastest); ``"hybrid"``: the first ``pre_channels`` channels of the un-rotated keys, then
        what those leave of the keys as they come; ``"rotated-mean"``: the same with the mean of the
        un-rotated keys alone.
    pre_channels : un-rotated channels of ``rope="hybrid"``, a multiple of 8; 4 bits each where
        bits are allocated, else the first of the schedule.
    clip : choose every channel's range by least fourth-power error instead of min to max.
    outlier_fraction : share of the packed tokens whose keys are held exact as well in each head:
        those that their codes misjudge most. 0 by default, since clipping by fourth powers leaves
        little to gain (docs/evaluation.md).
    sink_tokens : leading tokens held exact, at most 64.
    residual_length : recent tokens held exact; pages are packed whole, so up to 63 more are.
    min_fit_tokens : tokens a sequence must have before a basis (or, with ``prompt_ranges``, mean
        and ranges) is fitted and anything packed; by default four times head_dim.
    refit_drift : once the error of a sequence's latest keys is this many times what it was when its
        basis was fitted, later pages get a new basis, fitted on ``min_fit_tokens`` tokens that stay
        exact until then; None never does. See :meth:`svdq.SVDqCache.drift`. With a calibration,
        whose error is the measure, a sequence of ``min_fit_tokens`` may get one from its start.
    sparse_budget : packed tokens that a step of one token attends to in each KV head, in addition
        to sinks, outliers and window: a number, or a share below 1 of what is packed. None (the
        default) for all; or one of these for every layer of the model. Steps of more tokens
        (prompts, chunks) attend to all.
    sparse_scorer : how they are scored: ``"latent"``, by the first ``sparse_channels`` channels of
        the codes (svdq.ops.select), or ``"landmarks"``, by mean keys of chunks as in ShadowKV
        (arXiv 2410.21465), for comparison.
    sparse_channels : channels of ``"latent"``, a multiple of 4 up to 32.
    max_cache_len : tokens that a sequence may have, left padding included. Once all sequences are
        packed, memory for so many is allocated and decode steps run without the host, so that a
        model can be compiled (docs/kernels.md). None (the default): memory grows with the tokens.
        Not together with ``outlier_fraction``, ``refit_drift`` or ``sparse_budget``.
    prompt_ranges : mean and ranges of keys are those of each prompt, in a basis that was
        calibrated; for caches with a calibration alone, and not for hybrid keys.

    Raises
    ------
    ValueError
        For settings out of range or that contradict each other.
    """

    preset: str | None = None
    schedule: Sequence[int] | None = None
    k_bits: float | None = None
    kv_bits: float | None = None
    lambda_: float | None = None
    allocate_across: str = "model"
    query_weighted: bool | None = None
    v_bits: int | str | None = None
    rope: str = "pre"
    pre_channels: int = 8
    clip: bool = True
    outlier_fraction: float = 0.0
    sink_tokens: int = 8
    residual_length: int = 64
    min_fit_tokens: int | None = None
    refit_drift: float | None = None
    sparse_budget: int | float | None | Sequence[int | float | None] = None
    sparse_scorer: str = "latent"
    sparse_channels: int = DEFAULT_CHANNELS
    max_cache_len: int | None = None
    prompt_ranges: bool = False

    @classmethod
    def of(cls, **options: Any) -> Settings:
        """Settings from a user's keywords; names of earlier versions give a ``FutureWarning``."""
        for old in RENAMED.keys() & options.keys():
            new = RENAMED[old]
            if new in options:
                raise TypeError(f"give {new} or its old name {old}, not both")
            warnings.warn(f"{old} is now {new}", FutureWarning, stacklevel=3)
        for old in REMOVED.keys() & options.keys():
            warnings.warn(f"{old} is ignored: {REMOVED[old]}", FutureWarning, stacklevel=3)
        return cls(**renamed(options))

    def __post_init__(self) -> None:
        named = self.preset is not None or self.schedule is not None
        if not named and not self.allocates:
            average = ("kv_bits", KV_BITS) if self.v_bits is None else ("k_bits", K_BITS)
            self._set(*average)
        schedule, k_bits = resolve_keys(
            self.preset, self.schedule, self.k_bits, self.lambda_, self.kv_bits
        )
        allocated = k_bits, self.kv_bits, self.lambda_
        exact = schedule is None and all(x is None for x in allocated)
        self._set("preset", "exact" if exact else None)
        self._set("schedule", schedule)
        self._set("k_bits", k_bits)
        if self.query_weighted is None:
            self._set("query_weighted", not named and not exact)
        if self.v_bits is None and self.kv_bits is None:
            self._set("v_bits", "exact" if exact else 4)
        if self.kv_bits is not None and self.v_bits is not None:
            raise ValueError(f"kv_bits says the bits of values too, got v_bits={self.v_bits!r}")
        if isinstance(self.sparse_budget, Sequence):
            self._set("sparse_budget", tuple(self.sparse_budget))
        self._set("query_weighted", bool(self.query_weighted))
        self._set("clip", bool(self.clip))
        self._check()
        self._check_packed()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self) -> None:
        """Refuse numbers and names out of range."""
        average = isinstance(self.v_bits, float) and VALUE_BITS[-1] < self.v_bits < VALUE_BITS[0]
        if self.v_bits is not None and self.v_bits not in V_BITS and not average:
            raise ValueError(
                f"v_bits must be one of {V_BITS} or between {VALUE_BITS[-1]} and {VALUE_BITS[0]}, "
                f"got {self.v_bits!r}"
            )
        if self.rope not in PAGE_ROPES:
            raise ValueError(f"rope must be one of {tuple(PAGE_ROPES)}, got {self.rope!r}")
        if self.pre_channels < 8 or self.pre_channels % 8:
            raise ValueError(
                f"pre_channels must be a positive multiple of 8, got {self.pre_channels}"
            )
        if not 0 <= self.sink_tokens <= PAGE_TOKENS:
            raise ValueError(f"sink_tokens must be 0 .. {PAGE_TOKENS}, got {self.sink_tokens}")
        if self.allocate_across not in SCOPES:
            raise ValueError(
                f"allocate_across must be one of {SCOPES}, got {self.allocate_across!r}"
            )
        if self.residual_length < 0:
            raise ValueError(f"residual_length must be at least 0, got {self.residual_length}")
        if not 0 <= self.outlier_fraction < 0.5:
            raise ValueError(
                f"outlier_fraction must be at least 0 and below 0.5, got {self.outlier_fraction}"
            )
        if self.refit_drift is not None and not self.refit_drift > 1:
            raise ValueError(f"refit_drift must be above 1 or None, got {self.refit_drift}")
        if self.min_fit_tokens is not None and self.min_fit_tokens < 1:
            raise ValueError(f"min_fit_tokens must be at least 1, got {self.min_fit_tokens}")
        if self.max_cache_len is not None and self.max_cache_len < 1:
            raise ValueError(f"max_cache_len must be at least 1 or None, got {self.max_cache_len}")
        budgets = self.sparse_budget if self._has_layer_budgets else (self.sparse_budget,)
        for budget in budgets:
            if budget is not None:
                Sparsity(budget, self.sparse_scorer, self.sparse_channels)

    def _check_packed(self) -> None:
        """Refuse settings that need what others rule out."""
        if self.allocates_values and not self.allocates:
            raise ValueError(f"v_bits={self.v_bits} is an average: give k_bits or lambda_ with it")
        if self.allocates_values and (self.allocate_across == "head" or self.lambda_ is not None):
            raise ValueError(
                "bits of values are allocated across the model or each layer, with k_bits or "
                "kv_bits"
            )
        if not self.packs and self.v_bits in VALUE_BITS:
            raise ValueError(f"exact keys come with exact values, got v_bits={self.v_bits}")
        if self.lambda_ is not None and self.allocate_across != "model":
            raise ValueError(
                f"lambda_ is one price for the model, got allocate_across={self.allocate_across!r}"
            )
        if self.query_weighted and not self.packs:
            raise ValueError("query_weighted needs keys that are packed")
        if self.prompt_ranges and (not self.packs or PAGE_ROPES[self.rope] == "hybrid"):
            raise ValueError(
                "prompt_ranges needs keys that are packed with rope 'pre' or 'post', got "
                f"{self.rope!r}"
            )
        if self.sparse_budget is not None and not self.packs:
            raise ValueError("sparse_budget needs keys that are packed")
        if self.max_cache_len is None:
            return
        if not self.packs:
            raise ValueError("max_cache_len needs keys that are packed")
        for name, off in (("outlier_fraction", 0), ("refit_drift", None), ("sparse_budget", None)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"max_cache_len does not go together with {name}, got {getattr(self, name)!r}"
                )

    def check_layers(self, num_layers: int) -> None:
        """Refuse a list of budgets that does not have one for every layer."""
        if self._has_layer_budgets and len(self.sparse_budget) != num_layers:
            raise ValueError(
                f"sparse_budget must be one number or {num_layers}, one a layer, got "
                f"{len(self.sparse_budget)}"
            )

    @property
    def _has_layer_budgets(self) -> bool:
        return isinstance(self.sparse_budget, tuple)

    def sparsity(self, layer: int) -> Sparsity | None:
        """Sparsity of layer ``layer``; None for one that attends to everything."""
        budget = self.sparse_budget[layer] if self._has_layer_budgets else self.sparse_budget
        if budget is None:
            return None
        return Sparsity(budget, self.sparse_scorer, self.sparse_channels)

    @property
    def needs_landmarks(self) -> bool:
        """True if pages come with landmarks."""
        return self.sparse_budget is not None and self.sparse_scorer == "landmarks"

    @property
    def allocates(self) -> bool:
        """True if widths follow from the keys."""
        return any(x is not None for x in (self.k_bits, self.kv_bits, self.lambda_))

    @property
    def allocates_values(self) -> bool:
        """True if the bits of values follow from what they lose."""
        average = isinstance(self.v_bits, float) and not self.v_bits.is_integer()
        return self.kv_bits is not None or average

    @property
    def packs(self) -> bool:
        """True if anything is ever packed."""
        return self.schedule is not None or self.allocates

    @property
    def packs_values(self) -> bool:
        """True if values are coded in 4 bits or fewer."""
        return self.packs and (self.allocates_values or self.v_bits in VALUE_BITS)

    @property
    def needs_queries(self) -> bool:
        """True if the energy of the queries matters."""
        return self.allocates or self.query_weighted

    def scheduled_bands(self, head_dim: int) -> tuple[Bands, Bands]:
        """Pre-RoPE and post-RoPE bands of a head by the schedule."""
        pre_channels = self.pre_channels if self.rope == "hybrid" else 0
        return scheduled_bands(head_dim, self.schedule, pre_channels)

    def pre_bands(self) -> Bands:
        """Pre-RoPE bands of a head of a hybrid where those of post-RoPE channels are allocated."""
        channels = self.pre_channels if self.rope == "hybrid" else 0
        return tuple(channels if width == PRE_BITS else 0 for width in WIDTHS)

    def pre_bits(self, head_dim: int) -> float:
        """Bits per key number that those take."""
        return sum(self.pre_bands()) * PRE_BITS / head_dim

    def layout(
        self,
        bands: Sequence[Bands],
        head_dim: int,
        dtype: torch.dtype,
        pre_bands: Sequence[Bands] = (),
        head_v_bits: tuple[int, ...] | None = None,
    ) -> PageLayout:
        """The pages of a layer whose heads have these bands; a hybrid has ``pre_bands`` too.

        ``head_v_bits`` are those that were allocated; None before they are, or where none are.
        """
        full_bits = dtype.itemsize * 8
        v_bits = full_bits if self.v_bits == "exact" else self.v_bits
        if self.allocates_values:
            v_bits = VALUE_BITS[0]
        if v_bits not in (*VALUE_BITS, full_bits):
            raise ValueError(
                f"v_bits must be 4, 3, 2, {full_bits} or 'exact' for a model in {dtype}, got "
                f"{v_bits!r}"
            )
        rope = PAGE_ROPES[self.rope]
        return PageLayout(
            head_dim,
            tuple(bands),
            rope,
            int(v_bits) if head_v_bits is None else head_v_bits,
            pre_bands=tuple(pre_bands) if rope == "hybrid" else (),
        )
