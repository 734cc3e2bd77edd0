"""The cache that a model takes."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from svdq.cache import build, calibrated, serialization
from svdq.cache.family import check_family
from svdq.cache.layer import SVDqLayer
from svdq.cache.reports import ReportingCache
from svdq.cache.static_layer import StaticSVDqLayer
from svdq.cache.step import Step
from svdq.config.settings import Settings
from svdq.fit.calibration import Calibration
from svdq.fit.profile import Profile
from svdq.hf.long_context import keep_cache
from svdq.ops import NO_RULES, LogitRules
from svdq.ops.tensors import normal_tensors
from svdq.store.static_step import MAX_QUERIES

# crop(0) removes nothing where the argument counts tokens to remove, everything where it is a
# length to keep.
CROP_ZERO_REMOVES = "tokens_to_remove" not in inspect.signature(Cache.crop).parameters


class SVDqCache(ReportingCache):
    """A transformers cache whose full-attention layers hold SVDq-packed keys and quantized values.

    The model must run with ``attn_implementation="svdq"``. A prompt is attended exactly; then its
    keys are projected on the singular vectors of each head, quantized and packed, except for the
    first ``sink_tokens`` and the last ``residual_length`` tokens. Generated tokens follow as they
    leave that window. Sliding-window layers stay as they are in a ``DynamicCache``.

    Parameters
    ----------
    config : configuration of the model.
    profile : of the model, or its file (``svdq calibrate``): bits are allocated by it, so every
        prompt has pages of the same size and layers are packed as they are read.
    calibration : of the model, or its file (``svdq calibrate --bases``): basis, mean, ranges and
        widths for all prompts, so nothing is fitted to them. ``refit_drift`` fits a prompt all the
        same, whose keys have that many times the error that the calibration saw.
    settings : keywords of :class:`svdq.Settings`: ``preset``, ``schedule``, ``k_bits``,
        ``kv_bits``, ``lambda_``, ``allocate_across``, ``query_weighted``, ``v_bits``,
        ``rope``, ``pre_channels``, ``clip``, ``outlier_fraction``, ``sink_tokens``,
        ``residual_length``, ``min_fit_tokens``, ``refit_drift``, ``sparse_budget``,
        ``sparse_scorer``, ``sparse_channels``, ``max_cache_len``, ``prompt_ranges``. With a
        calibration those of bits, ``rope`` and ``clip`` are the calibration's.

    Raises
    ------
    ValueError
        For settings out of range or that contradict each other, a model without full-attention
        layers, or a calibration that is damaged or of another model.
    NotImplementedError
        For layer types that cannot be compressed, or keys that ``rope="pre"`` cannot un-rotate.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        profile: Profile | str | os.PathLike | None = None,
        calibration: Calibration | str | os.PathLike | None = None,
        **settings: Any,
    ) -> None:
        self.calibration = calibrated.open_calibration(calibration, profile)
        self.settings = Settings.of(**calibrated.cache_options(self.calibration, settings))
        config = config.get_text_config(decoder=True)
        self.settings.check_layers(config.num_hidden_layers)
        if getattr(config, "is_encoder_decoder", False):
            raise NotImplementedError("SVDqCache supports decoder-only models")
        self._frequencies = build.Frequencies(config)
        self._allocator = build.make_allocator(self.settings) if self.calibration is None else None
        super().__init__(
            layers=build.make_layers(config, self.settings, self._frequencies, self._allocator)
        )
        check_family(config)
        keep_cache(config, SVDqCache)
        self._step = Step(self.layers, self._allocator)
        for layer in self.svdq_layers:
            layer.step, layer.num_layers = self._step, config.num_hidden_layers
            if isinstance(layer, StaticSVDqLayer):
                layer.settle = self._settle
        if profile is not None:
            self._use_profile(profile)
        if self.calibration is not None:
            calibrated.calibrate_layers(self.calibration, config, self.svdq_layers)

    def _use_profile(self, profile: Profile | str | os.PathLike) -> None:
        settings = self.settings
        if self._allocator is None:
            raise ValueError("a profile allocates bits: give k_bits, kv_bits or lambda_ with it")
        if not isinstance(profile, Profile):
            profile = Profile.load(profile)
        layers = [layer.index for layer in self.svdq_layers]
        profile.check(layers, settings.rope, settings.pre_channels, settings.query_weighted)
        self._allocator.known = profile.widths(settings, self._allocator.budget)

    @property
    def is_croppable(self) -> bool:
        """True if all layers can be cropped."""
        return all(getattr(layer, "is_croppable", True) for layer in self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hand new keys and values, [B, H, L, D], to layer ``layer_idx``; models call it.

        Raises
        ------
        ValueError
            For a layer that the cache does not have, or what :meth:`SVDqLayer.update` refuses. The
            tokens of the model's current call are taken back in all layers then.
        RuntimeError
            If the model's last call stopped before all layers had its tokens.
        """
        is_static = self.settings.max_cache_len is not None and self.svdq_layers[0].is_static
        if is_static and key_states.shape[2] <= MAX_QUERIES:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._update_on_host(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def _update_on_host(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if not self._step.is_open:
            self._stop()
        if layer_idx >= len(self.layers):
            self._step.take_back()
            raise ValueError(
                f"the cache was made for a model of {len(self.layers)} layers, which has no layer "
                f"{layer_idx}"
            )
        self._step.begin(layer_idx, key_states.shape[-2])
        try:
            new = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException:
            self._step.take_back()
            raise
        if not isinstance(self.layers[layer_idx], SVDqLayer):
            self._step.end(layer_idx)
        return new

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self._step.forget()
        super().reset()
        for layer in self.layers:  # transformers 4 keeps zeros, which the next prompt would see
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.keys = layer.values = None
                layer.is_initialized = False
        self._frequencies.known.clear()
        if self._allocator is not None:
            self._allocator.reset()

    def crop(
        self,
        length: int | None = None,
        *,
        tokens_to_remove: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Forget the last tokens, packed ones too.

        Parameters
        ----------
        length : negative, the tokens to remove, or all if there are fewer; positive, the tokens to
            keep. What zero means follows the installed transformers: nothing where ``Cache.crop``
            takes tokens to remove (5.18 and newer), everything before.
        tokens_to_remove, max_length : the same by the names of transformers' versions.
        """
        given = [x for x in (length, tokens_to_remove, max_length) if x is not None]
        if len(given) != 1:
            raise TypeError(f"crop() takes one length, got {len(given)}")
        self._step.take_back()
        with self._on_host():
            self._crop(int(given[0]))

    def _crop(self, length: int) -> None:
        seq_length = self.get_seq_length()
        remove = max(seq_length - length, 0) if length > 0 else -length
        if length == 0 and CROP_ZERO_REMOVES:
            remove = seq_length
        if remove >= seq_length:
            return self.reset()  # of what was allocated, too
        # Sliding layers first: they may refuse, and then nothing has changed.
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, SVDqLayer)):
            if remove or not CROP_ZERO_REMOVES:
                layer.crop(-remove)
        return None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues the old sequence ``beam_idx[i]``; their pages stay shared."""
        self._step.take_back()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; copies share their pages."""
        self._step.take_back()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor | Sequence[int] | slice) -> None:
        """Keep the sequences that ``indices`` names, in its order; a mask and a slice do, too."""
        self._step.take_back()
        super().batch_select_indices(indices)

    def prefill_from(
        self,
        cache: DynamicCache,
        query_energy: Sequence[Tensor | None] | None = None,
        queries: dict[int, Tensor] | None = None,
        rules: dict[int, LogitRules] | None = None,
    ) -> None:
        """Compress the tokens of a full cache of the same model, without padding, into this one.

        Sliding-window layers are shared until either cache grows. ``query_energy`` holds, for each
        layer, the mean of the squared queries, rotated and times the softmax scale, over tokens and
        the query heads of a KV head, [H, D]; allocation and key gain need it. ``queries`` holds,
        by layer, the queries at :func:`svdq.sample_positions` of the tokens, [Hq, N, D], rotated
        and times the softmax scale; allocation of value bits needs them. ``rules`` holds, by layer,
        the softcap and the learned sinks that these queries attended with, where a model has them.

        Raises
        ------
        ValueError
            If this cache holds tokens already, or the other has other layers.
        """
        if self.get_seq_length():
            raise ValueError(
                f"prefill_from() needs an empty cache, got {self.get_seq_length()} tokens"
            )
        build.check_dynamic_layers(self.layers, cache.layers)
        self._step.take_back()
        try:
            for i, layer in enumerate(cache.layers):
                if isinstance(self.layers[i], SVDqLayer):
                    energy = query_energy[i] if query_energy is not None else None
                    own = None if queries is None else queries.get(i)
                    own_rules = (rules or {}).get(i, NO_RULES)
                    self.layers[i].prefill_from(layer.keys, layer.values, energy, own, own_rules)
                else:
                    self.layers[i] = copy.copy(layer)
        except BaseException:
            self.reset()
            raise
        self._settle()

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file; :meth:`load` reads it."""
        if not any(layer.pending for layer in self.svdq_layers):  # else saving is refused
            self._step.take_back()
        self._step.check()
        with self._on_host():
            digest = None if self.calibration is None else self.calibration.digest
            serialization.save(self.layers, self.settings, path, self._allocator, digest)

    @classmethod
    @normal_tensors
    def load(
        cls,
        path: str | os.PathLike,
        config: PretrainedConfig,
        device: str | torch.device = "cpu",
        *,
        calibration: Calibration | str | os.PathLike | None = None,
    ) -> SVDqCache:
        """Read a cache that :meth:`save` wrote for a model with this configuration.

        ``device`` is that of the model. A cache with a calibration needs the same one: its file
        does not hold what all prompts share.

        Raises
        ------
        ValueError
            If the file is no saved cache, damaged, of another format version, of a model of another
            shape, or packed with another calibration.
        """
        calibration = calibrated.open_calibration(calibration, None)
        with serialization.naming(path):
            saved = serialization.read(path, device)
            saved.check_calibration(None if calibration is None else calibration.digest)
            cache = cls(config, calibration=calibration, **saved.settings)
            text = config.get_text_config(decoder=True)
            shapes = [build.kv_shape(text, i) for i in range(len(cache.layers))]
            saved.restore(cache.layers, shapes)
            if cache._allocator is not None and saved.allocator is not None:
                cache._allocator.set_state(saved.allocator)
        cache._settle()
        return cache
