"""The cache that a model takes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from svdq.cache import calibrated, serialization
from svdq.cache.layer import SVDqLayer
from svdq.cache.memory import MemoryReport, memory_report
from svdq.cache.reads import ReadReport, read_report
from svdq.cache.static_layer import StaticSVDqLayer
from svdq.cache.tensor_walk import held_bytes
from svdq.config.settings import Settings
from svdq.fit.allocator import Allocator, Budget
from svdq.fit.calibration import Calibration
from svdq.fit.profile import Profile
from svdq.hf.rope import inverse_frequencies
from svdq.ops import NO_RULES, LogitRules
from svdq.ops.tensors import normal_tensors

logger = logging.get_logger(__name__)

# crop(0) removes nothing where the argument counts tokens to remove, everything where it is a
# length to keep.
CROP_ZERO_REMOVES = "tokens_to_remove" not in inspect.signature(Cache.crop).parameters


class SVDqCache(Cache):
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
        self._frequencies: list[Tensor] = []
        self._allocator = None
        if self.settings.allocates and self.calibration is None:
            chosen = self.settings
            v_bits = chosen.v_bits if chosen.allocates_values else None
            budget = Budget(chosen.k_bits, v_bits, chosen.kv_bits)
            self._allocator = Allocator(0, budget, chosen.lambda_, chosen.allocate_across)
        super().__init__(layers=self._layers(config))
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
        if settings.max_cache_len is None:
            return SVDqLayer(index, settings, frequencies, allocate)
        layer = StaticSVDqLayer(index, settings, frequencies, allocate)
        layer.settle = self._settle
        return layer

    def _frequencies_of(self, config: PretrainedConfig, index: int, max_position: int) -> Tensor:
        """Inverse frequencies of a layer, one tensor for all layers that have the same."""
        found = inverse_frequencies(config, index, max_position)
        for known in self._frequencies:
            if torch.equal(known, found):
                return known
        self._frequencies.append(found)
        return found

    def _settle(self) -> None:
        """Make the layers static once all of them have packed every sequence of the same tokens."""
        layers = self.svdq_layers
        if self.settings.max_cache_len is None or all(layer.is_static for layer in layers):
            return
        known = {layer.seq_length for layer in layers if not layer.is_static}
        if len(known) > 1 or known == {0}:
            return
        if all(layer.is_static or layer.can_start for layer in layers):
            for layer in layers:
                if not layer.is_static:
                    layer.start()
        elif layers[-1].seq_length:
            logger.warning_once(
                "SVDqCache: steps run uncompiled until all sequences have the tokens that a basis "
                "is fitted on (min_fit_tokens)"
            )

    @contextlib.contextmanager
    def _on_host(self) -> Iterator[None]:
        """Let the host know the lengths of all layers meanwhile."""
        for layer in self.svdq_layers:
            if layer.is_static:
                layer.stop()
        yield
        self._settle()

    @property
    def svdq_layers(self) -> list[SVDqLayer]:
        """The layers that compress."""
        return [layer for layer in self.layers if isinstance(layer, SVDqLayer)]

    @property
    def is_croppable(self) -> bool:
        """True if all layers can be cropped."""
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
        with self._on_host():
            self._crop(length)

    def _crop(self, length: int) -> None:
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
                own = None if queries is None else queries.get(i)
                own_rules = (rules or {}).get(i, NO_RULES)
                self.layers[i].prefill_from(layer.keys, layer.values, energy, own, own_rules)
            else:
                self.layers[i] = copy.copy(layer)
        self._settle()

    def drift(self) -> list[list[float]]:
        """Error of each layer's latest keys over that of the keys it was fitted or calibrated on.

        Returns
        -------
        drift : per compressing layer and sequence, the mean squared error of keys packed lately
            over that of the keys of the fit, mean over heads: 1 where nothing changed. NaN without
            a basis.
        """
        with self._on_host():
            return [layer.tokens.drift() if layer.tokens else [] for layer in self.svdq_layers]

    def domain_drift(self) -> list[float]:
        """Error of each sequence's keys under the calibration over what the calibration saw.

        The mean over layers; of one that has fitted the sequence since, before that. NaN where
        nothing is packed.
        """
        if self.calibration is None:
            raise ValueError("this cache has no calibration that a sequence could drift from")
        with self._on_host():
            known = [x.tokens.domain_drift() for x in self.svdq_layers if x.seq_length]
        return calibrated.mean_drift(known)

    def out_of_domain(self) -> list[bool]:
        """Whether each sequence is unlike the texts of the calibration: its keys have a larger
        error than any text that was held out from them, by a margin (docs/calibration.md)."""
        drifts = self.domain_drift()
        return [drift > self.calibration.drift_bound for drift in drifts]

    def memory_report(self) -> MemoryReport:
        """Bytes by part and of a full cache for the same tokens, and the true bits of a key."""
        with self._on_host():
            return memory_report(self.layers, self._frequencies, self._allocator)

    def read_report(self) -> ReadReport:
        """Bytes of keys that the last step of one token read, by part."""
        with self._on_host():
            return read_report(self.svdq_layers)

    def allocated_bytes(self) -> int:
        """Bytes of the storages of all tensors that the cache holds."""
        return held_bytes(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file; :meth:`load` reads it."""
        with self._on_host():
            digest = None if self.calibration is None else self.calibration.digest
            serialization.save(self.layers, self.settings, path, digest)

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
            If the file is no saved cache, of another format version, of a model of another shape,
            or packed with another calibration.
        """
        saved = serialization.read(path, device)
        calibration = calibrated.open_calibration(calibration, None)
        saved.check_calibration(None if calibration is None else calibration.digest)
        cache = cls(config, calibration=calibration, **saved.settings)
        saved.restore(cache.layers, _kv_shape(config))
        cache._settle()
        return cache


def _kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """KV heads and head_dim of a model."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, dim
