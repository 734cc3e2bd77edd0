"""The cache that ``generate(past_key_values=...)`` takes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from svdq.cache import serialization
from svdq.cache.layer import SVDqLayer
from svdq.cache.memory import MemoryReport, held_bytes, memory_report
from svdq.cache.reads import ReadReport, read_report
from svdq.config.presets import resolve_keys
from svdq.config.settings import ROPE_MODES, Settings
from svdq.fit.allocation import SCOPES, Allocator
from svdq.fit.profile import Profile
from svdq.hf.rope import inverse_frequencies
from svdq.layout import PAGE_TOKENS
from svdq.store.sparsity import DEFAULT_CHANNELS

# crop(0) removes nothing where the argument counts tokens to remove, everything where it is a
# length to keep.
CROP_ZERO_REMOVES = "tokens_to_remove" not in inspect.signature(Cache.crop).parameters
V_BITS = (2, 4, 16, 32, "exact")


class SVDqCache(Cache):
    """A transformers cache whose full-attention layers hold SVDq-packed keys and quantized values.

    The model must run with ``attn_implementation="svdq"``. A prompt is attended exactly; then its
    keys are projected on the singular vectors of each head, quantized and packed, except for the
    first ``sink_tokens`` and the last ``residual_length`` tokens. Generated tokens follow as they
    leave that window. Sliding-window layers stay what they are in a ``DynamicCache``.

    Parameters
    ----------
    config : configuration of the model.
    preset : name of a bit schedule in :data:`svdq.presets.PRESETS`. By default that of
        ``"paper-1.25"``, whose pages neither wait for other layers nor depend on other sequences.
        ``"exact"`` packs nothing.
    schedule : own bit schedule, widths of 8, 4, 2, 1, 0 per equal group of channels; instead of
        ``preset``.
    k_bits : code bits per key number on average, up to 8, allocated by water-filling; or 16 for
        exact keys and values. Instead of ``preset``. Where the average is over the model, a prompt
        stays exact until its last layer has been read.
    lambda_ : price of a bit in squared units of attention score; instead of ``k_bits``. Layers are
        packed as they are read.
    allocate_across : over what ``k_bits`` is the average: ``"model"``, each ``"layer"``, or each
        ``"head"``, whose pages are then equally large.
    query_weighted : fit bases in units of attention score, see svdq/weighting.py. By default True
        but for a ``preset`` or ``schedule`` that is named: those are the paper's.
    v_bits : 4 (default) or 2 bits per token and group, or exact: 16 or 32, whichever the model's
        dtype has, or ``"exact"`` for either.
    v_group_size : channels that share a value scale, a multiple of 16 that divides head_dim; about
        64 by default.
    rope : where keys are coded. ``"pre"``: un-rotated (the paper, most accurate); ``"post"``: as
        they come (fastest); ``"hybrid"``: the first ``core_channels`` un-rotated, what they leave
        as it comes; ``"rotated-mean"``: the same with the un-rotated keys' mean for a core.
    core_channels : un-rotated channels of ``rope="hybrid"``, a multiple of 8; 4 bits each where
        bits are allocated, else the first of the schedule.
    clip : choose every channel's range by least fourth-power error instead of min to max.
    outlier_fraction : share of the packed tokens whose keys are held exact as well in each head:
        those that their codes misjudge most. 0 by default, since clipping by fourth powers leaves
        little to gain (docs/evaluation.md).
    sink_tokens : leading tokens held exact, at most 64.
    residual_length : recent tokens held exact; pages are packed whole, so up to 63 more are.
    profile : of the model, or its file (``svdq calibrate``): bits are allocated by it, so every
        prompt has pages of the same size and layers are packed as they are read.
    refit_drift : once the error of a sequence's latest keys is this many times what it was when its
        basis was fitted, later pages get a new basis, fitted on ``min_fit_tokens`` tokens that stay
        exact until then; None never does. See :meth:`drift`.
    sparse_budget : packed tokens that a step of one token attends to in each KV head, beside sinks,
        outliers and window: a number, or a share below 1 of what is packed. None (the default) for
        all; or one of these for every layer of the model. Steps of more tokens (prompts, chunks)
        attend to all.
    sparse_scorer : what chooses them: ``"latent"``, the first ``sparse_channels`` channels of the
        codes (svdq.ops.select), or ``"landmarks"``, mean keys of chunks as in ShadowKV (arXiv
        2410.21465), for comparison.
    sparse_channels : channels of ``"latent"``, a multiple of 4 up to 32.
    min_fit_tokens : tokens a sequence must have before a basis is fitted and anything packed; by
        default four times head_dim.

    Raises
    ------
    ValueError
        For settings out of range or that contradict each other, or a model without full-attention
        layers.
    NotImplementedError
        For layer types that cannot be compressed, or keys that ``rope="pre"`` cannot un-rotate.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        preset: str | None = None,
        schedule: Sequence[int] | None = None,
        k_bits: float | None = None,
        lambda_: float | None = None,
        allocate_across: str = "model",
        query_weighted: bool | None = None,
        v_bits: int | str | None = None,
        v_group_size: int | None = None,
        rope: str = "pre",
        core_channels: int = 8,
        clip: bool = True,
        outlier_fraction: float = 0.0,
        sink_tokens: int = 8,
        residual_length: int = 64,
        min_fit_tokens: int | None = None,
        refit_drift: float | None = None,
        profile: Profile | str | os.PathLike | None = None,
        sparse_budget: int | float | Sequence[int | float | None] | None = None,
        sparse_scorer: str = "latent",
        sparse_channels: int = DEFAULT_CHANNELS,
    ) -> None:
        resolved, k_bits = resolve_keys(preset, schedule, k_bits, lambda_)
        allocates = k_bits is not None or lambda_ is not None
        named = preset is not None or schedule is not None
        exact = resolved is None and not allocates
        if exact and v_bits in (2, 4):
            raise ValueError(f"exact keys come with exact values, got v_bits={v_bits}")
        v_bits = ("exact" if exact else 4) if v_bits is None else v_bits
        self.settings = Settings(
            resolved,
            k_bits,
            lambda_,
            allocate_across,
            (not named and not exact) if query_weighted is None else bool(query_weighted),
            v_bits,
            v_group_size,
            rope,
            core_channels,
            bool(clip),
            outlier_fraction,
            sink_tokens,
            residual_length,
            min_fit_tokens,
            refit_drift,
            tuple(sparse_budget) if isinstance(sparse_budget, Sequence) else sparse_budget,
            sparse_scorer,
            sparse_channels,
        )
        config = config.get_text_config(decoder=True)
        _check_settings(self.settings, config.num_hidden_layers)
        if getattr(config, "is_encoder_decoder", False):
            raise NotImplementedError("SVDqCache supports decoder-only models")
        self._frequencies: list[Tensor] = []
        self._allocator = None
        if self.settings.allocates:
            self._allocator = Allocator(0, k_bits, lambda_, allocate_across)
        super().__init__(layers=self._layers(config))
        if profile is not None:
            self._use_profile(profile)

    def _use_profile(self, profile: Profile | str | os.PathLike) -> None:
        settings = self.settings
        if self._allocator is None:
            raise ValueError("a profile allocates bits: give k_bits or lambda_ with it")
        if not isinstance(profile, Profile):
            profile = Profile.load(profile)
        layers = [layer.index for layer in self.svdq_layers]
        profile.check(layers, settings.rope, settings.core_channels, settings.query_weighted)
        dim = next(iter(profile.spectra.values())).shape[1]
        self._allocator.known = profile.bands(
            settings.k_bits, settings.lambda_, settings.allocate_across, settings.core_bits(dim)
        )

    def _layers(self, config: PretrainedConfig) -> list:
        layers = DynamicCache(config=config).layers
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = self._layer(config, i)
                if self._allocator is not None:
                    self._allocator.num_layers += 1
            elif isinstance(layer, DynamicLayer) and type(layer) is not DynamicSlidingWindowLayer:
                raise NotImplementedError(
                    f"layer {i} caches as {type(layer).__name__}, which SVDqCache cannot compress"
                )
        if not any(isinstance(layer, SVDqLayer) for layer in layers):
            raise ValueError(
                f"{config.model_type!r} has no full-attention layer with this configuration, so "
                "nothing to compress"
            )
        return layers

    def _layer(self, config: PretrainedConfig, index: int) -> SVDqLayer:
        settings, frequencies = self.settings, None
        allocate = functools.partial(self._allocator.ask, index) if self._allocator else None
        if settings.packs and settings.rope != "post":
            if inverse_frequencies(config, index) is None:  # this layer does not rotate its keys
                settings = dataclasses.replace(settings, rope="post")
            else:
                frequencies = functools.partial(self._frequencies_of, config, index)
        return SVDqLayer(index, settings, frequencies, allocate)

    def _frequencies_of(self, config: PretrainedConfig, index: int, max_position: int) -> Tensor:
        """Inverse frequencies of a layer, one tensor for all layers that have the same."""
        found = inverse_frequencies(config, index, max_position)
        for known in self._frequencies:
            if torch.equal(known, found):
                return known
        self._frequencies.append(found)
        return found

    @property
    def svdq_layers(self) -> list[SVDqLayer]:
        """The layers that compress."""
        return [layer for layer in self.layers if isinstance(layer, SVDqLayer)]

    @property
    def is_croppable(self) -> bool:
        """Whether all layers can be cropped."""
        return all(getattr(layer, "is_croppable", True) for layer in self.layers)

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        super().reset()
        self._frequencies.clear()
        if self._allocator is not None:
            self._allocator.reset()

    def crop(self, length: int) -> None:
        """Forget the last tokens, packed ones too.

        Parameters
        ----------
        length : negative, the tokens to remove; positive, the tokens to keep. What zero means
            follows the installed transformers: nothing where ``Cache.crop`` takes tokens to remove
            (5.18 and newer), everything before.
        """
        seq_length = self.get_seq_length()
        remove = max(seq_length - length, 0) if length > 0 else -length
        if length == 0 and CROP_ZERO_REMOVES:
            remove = seq_length
        if remove > seq_length:
            raise ValueError(f"cannot remove {remove} tokens of {seq_length}")
        # Sliding layers first: they may refuse, and then nothing has changed.
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, SVDqLayer)):
            if remove or not CROP_ZERO_REMOVES:
                layer.crop(-remove)

    def prefill_from(
        self, cache: DynamicCache, query_energy: Sequence[Tensor | None] | None = None
    ) -> None:
        """Compress the tokens of a full cache of the same model, without padding, into this one.

        Sliding-window layers are shared until either cache grows. ``query_energy`` holds, for each
        layer, the mean of the squared queries, rotated and times the softmax scale, over tokens and
        the query heads of a KV head, [H, D]; allocating and weighing need it.

        Raises
        ------
        ValueError
            If this cache holds tokens already, or the other has other layers.
        """
        if self.get_seq_length():
            raise ValueError(
                f"prefill_from() needs an empty cache, got {self.get_seq_length()} tokens"
            )
        fits = len(cache.layers) == len(self.layers) and all(
            type(theirs) is (DynamicLayer if isinstance(own, SVDqLayer) else type(own))
            for own, theirs in zip(self.layers, cache.layers, strict=True)
        )
        if not fits:
            raise ValueError(
                f"expected a DynamicCache of the same model, got layers "
                f"{[type(layer).__name__ for layer in cache.layers]}"
            )
        for i, layer in enumerate(cache.layers):
            if isinstance(self.layers[i], SVDqLayer):
                energy = query_energy[i] if query_energy is not None else None
                self.layers[i].prefill_from(layer.keys, layer.values, energy)
            else:
                self.layers[i] = copy.copy(layer)

    def drift(self) -> list[list[float]]:
        """How much worse each layer codes its latest keys than those it was fitted on.

        Returns
        -------
        drift : per compressing layer and sequence, the mean squared error of keys packed lately
            over that of the keys of the fit, mean over heads: 1 where nothing changed. NaN without
            a basis.
        """
        return [layer.tokens.drift() if layer.tokens else [] for layer in self.svdq_layers]

    def memory_report(self) -> MemoryReport:
        """Bytes by part and of a full cache for the same tokens, and the true bits of a key."""
        return memory_report(self)

    def read_report(self) -> ReadReport:
        """Bytes of keys that the last step of one token read, by part."""
        return read_report(self)

    def allocated_bytes(self) -> int:
        """Bytes of the storages of all tensors that the cache holds."""
        return held_bytes(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file; :meth:`load` reads it."""
        serialization.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: PretrainedConfig,
        device: str | torch.device = "cpu",
    ) -> SVDqCache:
        """Read a cache that :meth:`save` wrote for a model with this configuration.

        ``device`` is where it shall live, that of the model.

        Raises
        ------
        ValueError
            If the file is no saved cache, of another format version, or of a model of another
            shape.
        """
        return serialization.load(cls, path, config, device)


def _check_settings(settings: Settings, num_layers: int) -> None:
    if settings.v_bits not in V_BITS:
        raise ValueError(f"v_bits must be one of {V_BITS}, got {settings.v_bits!r}")
    if settings.rope not in ROPE_MODES:
        raise ValueError(f"rope must be one of {ROPE_MODES}, got {settings.rope!r}")
    if settings.core_channels < 8 or settings.core_channels % 8:
        raise ValueError(
            f"core_channels must be a positive multiple of 8, got {settings.core_channels}"
        )
    if not 0 <= settings.sink_tokens <= PAGE_TOKENS:
        raise ValueError(f"sink_tokens must be 0 .. {PAGE_TOKENS}, got {settings.sink_tokens}")
    if settings.allocate_across not in SCOPES:
        raise ValueError(
            f"allocate_across must be one of {SCOPES}, got {settings.allocate_across!r}"
        )
    if settings.lambda_ is not None and settings.allocate_across != "model":
        raise ValueError(
            f"lambda_ is one price for the model, got allocate_across={settings.allocate_across!r}"
        )
    if settings.query_weighted and not settings.packs:
        raise ValueError("query_weighted needs keys that are packed")
    if settings.residual_length < 0:
        raise ValueError(f"residual_length must be at least 0, got {settings.residual_length}")
    if not 0 <= settings.outlier_fraction < 0.5:
        raise ValueError(
            f"outlier_fraction must be at least 0 and below 0.5, got {settings.outlier_fraction}"
        )
    if settings.refit_drift is not None and not settings.refit_drift > 1:
        raise ValueError(f"refit_drift must be above 1 or None, got {settings.refit_drift}")
    least = settings.min_fit_tokens
    if least is not None and least < 1:
        raise ValueError(f"min_fit_tokens must be at least 1, got {least}")
    budget = settings.sparse_budget
    if isinstance(budget, tuple) and len(budget) != num_layers:
        raise ValueError(
            f"sparse_budget must be one number or {num_layers}, one a layer, got {len(budget)}"
        )
    if budget is not None and not settings.packs:
        raise ValueError("sparse_budget needs keys that are packed")
    for layer in range(num_layers):
        settings.sparsity(layer)
