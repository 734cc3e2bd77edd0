"""Calibrated bases: codecs and widths of a model's keys, fitted once on several texts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdq.config.settings import Settings, renamed
from svdq.layout import PageLayout
from svdq.ops import KeyCodec
from svdq.ops.tensors import normal_tensors

FORMAT, VERSION = "svdq-calibration", 1
# Settings that the codecs follow from; a cache takes them from the file.
CODEC_SETTINGS = (
    *("schedule", "k_bits", "kv_bits", "lambda_", "allocate_across", "query_weighted", "v_bits"),
    *("rope", "pre_channels", "clip"),
)
# Facts of a model's configuration that tell models apart.
MODEL_FACTS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


def model_facts(config: Any) -> dict[str, Any]:
    """Facts of a text model's configuration by name.

    Those that it does not have, or not one of for all layers, are left out.
    """

    def fact(name: str) -> Any:
        try:
            return getattr(config, name, None)
        except RuntimeError:  # of transformers 5 for what differs between layers
            return None

    found = {name: fact(name) for name in MODEL_FACTS}
    return {name: x for name, x in found.items() if isinstance(x, (int, str))}


@dataclass(frozen=True)
class CalibratedLayer:
    """Codec and widths of one layer's keys, for all prompts.

    Tensors are never written, so caches share them; a copy of a cache shares them too.

    Parameters
    ----------
    layout : pages; bits of values are those that were allocated, or of the model's dtype.
    codec : of a batch of one, without ``inv_freq``: basis [1, R, D] and so on.
    error : [H] float32, mean squared error of a calibration key times its gain.
    gain : [1, H, D] bfloat16 that keys are multiplied by, or None.
    energy : [H, D] float32 of the queries of such keys, by which channels count; or None.
    inv_freq : [rotary_dim / 2] float32 at the positions of the calibration; None for
        ``rope="post"``.
    """

    layout: PageLayout
    codec: KeyCodec
    error: Tensor
    gain: Tensor | None = None
    energy: Tensor | None = None
    inv_freq: Tensor | None = None
    _copies: dict[torch.device, CalibratedLayer] = field(
        default_factory=dict, repr=False, compare=False
    )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in files."""
        own = {name: getattr(self, name) for name in ("error", "gain", "energy", "inv_freq")}
        return {**self.codec.tensors(), **{name: x for name, x in own.items() if x is not None}}

    @normal_tensors
    def on(self, device: torch.device) -> CalibratedLayer:
        """The same on a device, one copy for all caches there."""
        if self.error.device == device:
            return self
        if device not in self._copies:
            moved = {name: x.to(device) for name, x in self.tensors().items()}
            self._copies[device] = _layer_of(self.layout, moved)
        return self._copies[device]

    def page_layout(self, settings: Settings, dtype: torch.dtype) -> PageLayout:
        """The pages for a cache's settings; exact values have the model's dtype."""
        own = self.layout
        v_bits = own.v_bits if own.packs_values else None
        return settings.layout(own.bands, own.head_dim, dtype, own.pre_bands, v_bits)

    def check_shape(self, layer: int, heads: int, dim: int) -> None:
        """Refuse keys of other heads than those that were calibrated."""
        own = self.layout.num_kv_heads, self.layout.head_dim
        if own != (heads, dim):
            raise ValueError(
                f"layer {layer}: the calibration has (KV heads, head_dim) {own}, the keys "
                f"{(heads, dim)}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> CalibratedLayer:
        # Stores refer to these tensors too: their copies must refer to the same.
        memo.update({id(x): x for x in self.tensors().values()})
        for copied in self._copies.values():
            copied.__deepcopy__(memo)
        return self


def _layer_of(layout: PageLayout, tensors: dict[str, Tensor]) -> CalibratedLayer:
    own = {name: tensors.get(name) for name in ("error", "gain", "energy", "inv_freq")}
    codec = {name: tensors.get(name) for name in ("basis", "scale", "mean", "post_mean")}
    return CalibratedLayer(layout, KeyCodec(**codec), **own)


@dataclass(frozen=True)
class Calibration:
    """Calibrated bases of a model: what ``svdq calibrate --bases`` writes.

    A cache with a calibration packs a prompt without fitting anything to it: its pages have the
    same layout for all prompts, and no prompt has bytes of a basis.

    Parameters
    ----------
    model : :func:`model_facts` of the model.
    settings : :data:`CODEC_SETTINGS` by name.
    layers : by index, the layers that attend to all tokens.
    texts : names of the texts that it was fitted on.
    num_tokens : keys of a layer that it was fitted on.
    drift_bound : drift above which a prompt is out of the domain of these texts, see
        :meth:`svdq.SVDqCache.domain_drift`.
    held_out : rows of what ``svdq calibrate`` measured on text that was held out.
    source : file that it was read from, for messages.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    layers: dict[int, CalibratedLayer]
    texts: tuple[str, ...] = ()
    num_tokens: int = 0
    drift_bound: float = float("inf")
    held_out: tuple[dict[str, Any], ...] = ()
    source: str = "the calibration"

    def cache_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Keywords of a cache's settings from those of a user.

        Raises
        ------
        ValueError
            For keywords that contradict what was calibrated.
        """
        base, named = Settings(**self.settings), renamed(options)
        if named.get("preset") is not None:
            named["schedule"] = Settings(preset=named["preset"]).schedule
        for name in CODEC_SETTINGS:
            asked, own = named.get(name), getattr(base, name)
            if isinstance(asked, Sequence) and not isinstance(asked, str):
                asked = tuple(asked)
            if asked is not None and asked != own:
                raise ValueError(
                    f"{self.source} is calibrated for {name}={own!r}, the cache asks for {asked!r}"
                )
        others = {n: x for n, x in options.items() if n not in (*CODEC_SETTINGS, "preset")}
        return {**others, **self.settings}

    def check_model(self, config: Any, layers: Sequence[int]) -> None:
        """Refuse a model, or layers that compress, other than those that were calibrated.

        Raises
        ------
        ValueError
            That names the file and what differs.
        """
        facts = model_facts(config)
        for name, own in self.model.items():
            if name in facts and facts[name] != own:  # versions of transformers have other names
                raise ValueError(
                    f"{self.source} is calibrated for a model with {name}={own!r}, this one has "
                    f"{facts[name]!r}"
                )
        if sorted(self.layers) != sorted(layers):
            raise ValueError(
                f"{self.source} is calibrated for layers {sorted(self.layers)}, this model "
                f"compresses {sorted(layers)}"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of layouts and tensors, as hex: says which calibration a cache was packed by."""
        found = hashlib.sha256(json.dumps(self._layouts()).encode())
        for index in sorted(self.layers):
            for name, x in sorted(self.layers[index].tensors().items()):
                found.update(f"{index}.{name}{tuple(x.shape)}".encode())
                found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def _layouts(self) -> dict[str, list[int]]:
        return {str(index): layer.layout.ints for index, layer in sorted(self.layers.items())}

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a safetensors file."""
        facts = {
            "model": self.model,
            "settings": self.settings,
            "layouts": self._layouts(),
            "texts": self.texts,
            "num_tokens": self.num_tokens,
            "drift_bound": self.drift_bound,
            "held_out": self.held_out,
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "facts": json.dumps(facts)}
        tensors = {
            f"{index}.{name}": x.detach().cpu().contiguous()
            for index, layer in self.layers.items()
            for name, x in layer.tensors().items()
        }
        save_file(tensors, path, metadata)

    @classmethod
    @normal_tensors
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read a file of :meth:`save`.

        Raises
        ------
        ValueError
            That names the file, for one that is no calibration, of a newer version, cut short or
            damaged.
        FileNotFoundError
            If there is no such file.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in _names(file, metadata)}
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read, it is damaged or cut short: {error}"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no svdq calibration")
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"{path} has calibration version {metadata.get('version')}, this svdq reads "
                f"{VERSION}"
            )
        try:
            facts = json.loads(metadata["facts"])
            layouts = facts.pop("layouts")
            layers = {int(i): _read_layer(int(i), ints, tensors) for i, ints in layouts.items()}
            facts |= {"texts": tuple(facts["texts"]), "held_out": tuple(facts["held_out"])}
            found = cls(**facts, layers=layers, source=str(path))
            Settings(**found.settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return found


def _names(file: Any, metadata: dict[str, str]) -> list[str]:
    """Tensors to read: of a file that is something else none, which may be large."""
    known = metadata.get("format") == FORMAT and metadata.get("version") == str(VERSION)
    return list(file.keys()) if known else []


def _read_layer(index: int, ints: list[int], tensors: dict[str, Tensor]) -> CalibratedLayer:
    """Layer ``index`` of a file, its tensors checked against the layout."""
    layout = PageLayout.from_ints(ints)
    prefix = f"{index}."
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    heads, dim, rank = layout.num_kv_heads, layout.head_dim, layout.rank
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "basis": ((1, rank, dim), torch.bfloat16),
        "scale": ((1, rank), torch.float32),
        "mean": ((1, heads, dim), torch.float32),
        "post_mean": ((1, heads, dim), torch.float32),
        "error": ((heads,), torch.float32),
        "gain": ((1, heads, dim), torch.bfloat16),
        "energy": ((heads, dim), torch.float32),
    }
    needed = {"basis", "scale", "mean", "error"}
    needed |= {"post_mean"} if layout.rope == "hybrid" else set()
    needed |= set() if layout.rope == "post" else {"inv_freq"}
    for name in needed - own.keys():
        raise ValueError(f"layer {index} has no tensor {name!r}")
    for name, x in own.items():
        if name == "inv_freq":
            fits = x.ndim == 1 and 2 * len(x) <= dim and x.dtype == torch.float32
        else:
            fits = (tuple(x.shape), x.dtype) == expected.get(name)
        if not fits or not bool(x.isfinite().all()):
            raise ValueError(
                f"layer {index}: {name} is {x.dtype} {tuple(x.shape)} or not finite, expected "
                f"{expected.get(name)}"
            )
    return _layer_of(layout, own)


def with_held_out(
    calibration: Calibration, rows: Sequence[dict[str, Any]], drift_bound: float
) -> Calibration:
    """The same with what was measured on held-out text."""
    return replace(calibration, held_out=tuple(rows), drift_bound=drift_bound)
