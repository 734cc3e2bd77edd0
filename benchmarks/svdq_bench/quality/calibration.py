"""Calibrated bases of a model, fitted on windows of several texts.

A window is prefilled exactly. Its keys, without sinks, are rotated on to positions that follow
those of the windows before, so that all of them are the keys of one long sequence, and are fitted
like those of a prompt: a rotation changes neither un-rotated keys nor the energy of queries.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdq import Settings, SVDqCache, sample_positions
from svdq.cache.layer import SVDqLayer
from svdq.fit.calibration import CODEC_SETTINGS, CalibratedLayer, Calibration, model_facts
from svdq.fit.layer_fit import LayerFit, SequenceFit
from svdq.fit.ranges import coding_errors
from svdq.layout import PageLayout
from svdq.ops import KeyCodec
from svdq.ops.tensors import normal_tensors
from svdq.store.packed import PackedStore
from svdq_bench.quality.prefix import Prefix, read_prefix


@dataclass(frozen=True)
class Windows:
    """Windows of one text.

    Parameters
    ----------
    text : its name.
    fitted, held_out : [1, T] int64 each.
    """

    text: str
    fitted: list[Tensor]
    held_out: list[Tensor]


def cut_windows(text: str, token_ids: Tensor, count: int, tokens: int, predicted: int) -> Windows:
    """Windows to fit and one that is held out, spread over a text.

    The text is cut into ``count + 1`` parts; a window is in the middle of its part, and the last
    one is held out. Windows of a text that is too short for so many tokens are shorter.

    Parameters
    ----------
    token_ids : [T] int64, the text.
    count : windows to fit.
    tokens : of a window to fit, and of a context that is held out.
    predicted : tokens that follow a context that is held out.

    Raises
    ------
    ValueError
        For a text of which a part has no tokens to predict.
    """
    part = len(token_ids) // (count + 1)
    if count < 1 or part <= predicted:
        raise ValueError(
            f"text {text!r} has {len(token_ids)} tokens, too few for {count} windows and one that "
            f"is held out with {predicted} tokens to predict"
        )
    sizes = [min(tokens, part)] * count + [min(tokens + predicted, part)]
    starts = [i * part + (part - size) // 2 for i, size in enumerate(sizes)]
    found = [token_ids[None, i : i + n] for i, n in zip(starts, sizes, strict=True)]
    return Windows(text, found[:-1], found[-1:])


def shifted(keys: Tensor, inv_freq: Tensor | None, positions: int) -> Tensor:
    """Rotated keys [H, T, D] as they were ``positions`` further on, float32.

    Pair i, channels i and ``i + n`` of the first 2 n, turns by ``positions * inv_freq[i]``.
    """
    keys = keys.float()
    if inv_freq is None or positions == 0:
        return keys
    angle = positions * inv_freq.double().to(keys.device)
    cos, sin = angle.cos().float(), angle.sin().float()
    pairs = len(inv_freq)
    x, y, rest = keys.split([pairs, pairs, keys.shape[2] - 2 * pairs], dim=2)
    return torch.cat([x * cos - y * sin, x * sin + y * cos, rest], dim=2)


@dataclass
class _LayerKeys:
    """Keys of one layer from all windows, and what they were attended with."""

    layer: SVDqLayer
    fit: LayerFit
    inv_freq: Tensor | None
    keys: list[Tensor] = field(default_factory=list)
    count: int = 0
    energy: Tensor | float = 0.0
    queries: int = 0

    def add(self, prefix: Prefix, sinks: int) -> None:
        """Take a window that was read."""
        index, held = self.layer.index, prefix.cache.layers[self.layer.index]
        own, tokens = held.keys[0], held.keys.shape[2]
        self.keys.append(shifted(own[:, sinks:], self.inv_freq, self.count - sinks))
        self.count += tokens - sinks
        self.energy = self.energy + prefix.query_energy[index] * tokens
        self.queries += tokens
        if self.fit.value_loss is not None:
            self.fit.value_loss.add(
                0,
                prefix.samples[index],
                sample_positions(tokens),
                own,
                held.values[0],
                prefix.rules[index],
            )

    def measure(self) -> SequenceFit:
        """Gain and bases of all keys, which are joined."""
        self.keys = [torch.cat(self.keys, dim=1)]
        if self.fit.energy is not None:
            self.fit.energy.set(self.energy / self.queries, self.queries)
        return self.fit.measure(0, self.keys[0], self.inv_freq, 0, False)

    def finish(self, fit: SequenceFit, layout: PageLayout, clip: bool) -> CalibratedLayer:
        """The calibrated layer, once its pages are known."""
        keys, device = self.keys.pop(), self.fit.device
        gain = energy = None
        if fit.gain is not None:
            keys, gain = keys * fit.gain[:, None], fit.gain[None].bfloat16()
        if self.fit.energy is not None:
            pairs = 0 if self.inv_freq is None else len(self.inv_freq)
            energy = self.fit.energy.mean(0, pairs)
            energy = energy if fit.gain is None else energy / fit.gain.square()
        store = PackedStore(layout, 1, torch.float32, device)
        store.set_frequencies(self.inv_freq)
        store.fit(0, keys, 0, clip=clip, bases=fit.bases)
        error = coding_errors(keys, store.codec.sequence(0), layout).mean(dim=1)
        codec = store.packed_keys().codec
        found = CalibratedLayer(
            layout,
            KeyCodec(**codec.tensors()),
            error,
            gain,
            energy,
            self.inv_freq,
        )
        return _kept(found)


@normal_tensors
def _kept(layer: CalibratedLayer) -> CalibratedLayer:
    """The same on the CPU, in tensors that caches may use inside and outside of inference mode."""
    own = {name: x.cpu().clone() for name, x in layer.tensors().items()}
    codec = {name: own.pop(name) for name in layer.codec.tensors()}
    return CalibratedLayer(layer.layout, KeyCodec(**codec), **own)


@torch.inference_mode()
def calibrate_bases(
    model: PreTrainedModel,
    texts: Sequence[Windows],
    settings: dict[str, Any],
    sink_tokens: int = 8,
    begin: Callable[[str], None] = lambda step: None,
) -> Calibration:
    """Fit bases, means, ranges, key gains and widths of a model's layers on windows of texts.

    Parameters
    ----------
    texts : at least one window in all.
    settings : keywords of :class:`svdq.Settings`: bits, ``rope``, ``pre_channels``, ``clip``.
    sink_tokens : first tokens of a window, whose keys are left out.
    begin : called with the name of each of ``windows + 1`` steps as it begins.

    Raises
    ------
    ValueError
        If there is no window, one has no tokens but sinks, or the settings pack nothing.
    """
    windows = [(text.text, window) for text in texts for window in text.fitted]
    if not windows or min(window.shape[1] for _, window in windows) <= sink_tokens:
        raise ValueError(f"expected windows of more than {sink_tokens} tokens to calibrate on")
    cache = SVDqCache(model.config, **settings, sink_tokens=sink_tokens)
    if not cache.settings.packs:
        raise ValueError("exact keys need no calibration: give bits")
    longest = max(window.shape[1] for _, window in windows)
    found: list[_LayerKeys] = []
    for name, window in windows:
        begin(name)
        prefix = read_prefix(model, window.to(model.device))
        if not found:
            found = [_layer_keys(x, prefix, longest) for x in cache.svdq_layers]
        for own in found:
            own.add(prefix, sink_tokens)
        del prefix
    begin("fit")
    fits, layouts = [own.measure() for own in found], {}
    for own, fit in zip(found, fits, strict=True):
        own.fit.waiting[0] = fit
        answer = functools.partial(layouts.__setitem__, own.layer.index)
        if own.fit.layout is not None:
            answer(own.fit.layout)
        else:  # a basis that all prompts share costs a prompt nothing
            own.fit.ask_widths(sys.maxsize, answer)
    layers = {
        own.layer.index: own.finish(fit, layouts[own.layer.index], cache.settings.clip)
        for own, fit in zip(found, fits, strict=True)
    }
    config = model.config.get_text_config(decoder=True)
    return Calibration(
        model_facts(config),
        _codec_settings(cache.settings),
        layers,
        tuple(text.text for text in texts),
        found[0].count,
    )


def _layer_keys(layer: SVDqLayer, prefix: Prefix, longest: int) -> _LayerKeys:
    keys = prefix.cache.layers[layer.index].keys
    _, heads, _, dim = keys.shape
    shape = (1, heads, dim)
    fit = LayerFit(
        layer.settings, shape, keys.dtype, keys.device, layer.frequencies, layer.allocate
    )
    return _LayerKeys(layer, fit, fit.inv_freq(longest - 1))


def _codec_settings(settings: Settings) -> dict[str, Any]:
    """What a cache takes from the calibration, with names as its keywords have them."""
    return {name: getattr(settings, name) for name in CODEC_SETTINGS}
