"""Spectra of a model's keys, measured once: bit allocations for any prompt, known beforehand."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdq.config.settings import Settings, renamed
from svdq.fit.allocation import overhead_bits
from svdq.fit.allocator import Allocator, Budget, Demand, Widths
from svdq.ops.tensors import normal_tensors

FORMAT, VERSION = "svdq-profile", "1"


@dataclass(frozen=True)
class Profile:
    """Spectra of a model's keys in units of attention score.

    A cache with a profile knows the pages of every layer before it sees a prompt: layers are packed
    as they are read, and pages of all prompts are alike, as servers need them. Bases are fitted on
    each prompt all the same.

    Parameters
    ----------
    spectra : layer index -> [H, D] float32, score variances in descending order.
    rope, pre_channels, query_weighted : of the caches that the spectra are for.
    num_tokens : tokens of a prompt that they were measured on.
    value_loss : layer index -> [H] float32, loss of values
        (:class:`svdq.fit.value_loss.ValueLoss`); empty in files of earlier versions.
    """

    spectra: dict[int, Tensor]
    rope: str
    pre_channels: int
    query_weighted: bool
    num_tokens: int
    value_loss: dict[int, Tensor] = field(default_factory=dict)

    def widths(self, settings: Settings, budget: Budget) -> dict[int, Widths]:
        """Widths of every layer for the settings of a cache and the budget that they name."""
        layers = sorted(self.spectra)
        dim = self.spectra[layers[0]].shape[1]
        overhead, taken = overhead_bits(dim, self.num_tokens), settings.pre_bits(dim)
        losses = self.value_loss if settings.allocates_values else {}
        if settings.allocates_values and not losses:
            raise ValueError(
                "the profile does not say what values lose, so it cannot allocate their bits; "
                "measure it again with 'svdq calibrate'"
            )
        allocator = Allocator(len(layers), budget, settings.lambda_, settings.allocate_across)
        found: dict[int, Widths] = {}
        for i in layers:
            demand = Demand(self.spectra[i], overhead, taken, losses.get(i))
            allocator.ask(i, demand, functools.partial(found.__setitem__, i))
        return found

    def check(self, layers: Sequence[int], rope: str, pre_channels: int, weighted: bool) -> None:
        """Refuse layers or settings other than those of the spectra."""
        if sorted(self.spectra) != sorted(layers):
            raise ValueError(
                f"the profile is of layers {sorted(self.spectra)}, the model compresses "
                f"{sorted(layers)}"
            )
        own, asked = (
            (mode, n if mode == "hybrid" else None, bool(w))
            for mode, n, w in (
                (self.rope, self.pre_channels, self.query_weighted),
                (rope, pre_channels, weighted),
            )
        )
        if own != asked:
            raise ValueError(
                f"the profile is for (rope, pre_channels, query_weighted) {own}, the cache has "
                f"{asked}"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a safetensors file."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "settings": json.dumps(
                {
                    "rope": self.rope,
                    "pre_channels": self.pre_channels,
                    "query_weighted": self.query_weighted,
                    "num_tokens": self.num_tokens,
                }
            ),
        }
        tensors = {str(i): x.cpu().contiguous() for i, x in self.spectra.items()}
        tensors |= {f"value_loss.{i}": x.contiguous() for i, x in self.value_loss.items()}
        save_file(tensors, path, metadata)

    @classmethod
    @normal_tensors
    def load(cls, path: str | os.PathLike) -> Profile:
        """Read a file of :meth:`save`; ``ValueError`` if it is something else."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                raise ValueError(f"{path} is no svdq profile of version {VERSION}")
            settings = json.loads(metadata["settings"])
            names = list(file.keys())
            spectra = {int(name): file.get_tensor(name) for name in names if name.isdigit()}
            losses = {
                int(name.split(".")[1]): file.get_tensor(name)
                for name in names
                if name.startswith("value_loss.")
            }
        return cls(spectra, **renamed(settings), value_loss=losses)


def mean_profile(profiles: Sequence[Profile]) -> Profile:
    """The mean of profiles of several prompts, which have the same settings."""
    first = profiles[0]

    def mean(name: str) -> dict[int, Tensor]:
        parts = [getattr(profile, name) for profile in profiles]
        return {i: torch.stack([part[i] for part in parts]).mean(0) for i in parts[0]}

    return replace(first, spectra=mean("spectra"), value_loss=mean("value_loss"))
