"""Spectra of a model's keys, measured once: bit allocations for any prompt, known beforehand."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdq.config.settings import renamed
from svdq.fit.allocation import (
    code_something,
    equal_budgets,
    overhead_bits,
    solve_lambda,
    water_fill,
)
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
    """

    spectra: dict[int, Tensor]
    rope: str
    pre_channels: int
    query_weighted: bool
    num_tokens: int

    def bands(
        self, k_bits: float | None, lambda_: float | None, scope: str = "model", taken: float = 0.0
    ) -> dict[int, Tensor]:
        """Bands of every layer, [H, 4] int32; arguments as for
        :class:`svdq.fit.allocation.Allocator`.

        ``taken`` is the part of ``k_bits`` that pre-RoPE channels take.
        """
        layers = sorted(self.spectra)
        spectra = [self.spectra[i] for i in layers]
        overhead = overhead_bits(spectra[0].shape[1], self.num_tokens)
        if lambda_ is not None:
            found = [water_fill(x, lambda_, overhead) for x in spectra]
        elif scope == "head":
            found = [equal_budgets(x, k_bits - taken) for x in spectra]
        elif scope == "layer":
            found = [solve_lambda([x], k_bits - taken, overhead)[1][0] for x in spectra]
        else:
            found = solve_lambda(spectra, k_bits - taken, overhead)[1]
        pairs = zip(layers, spectra, found, strict=True)
        return {i: code_something(bands, x) for i, x, bands in pairs}

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
            spectra = {int(name): file.get_tensor(name) for name in names}
        return cls(spectra, **renamed(settings))


def mean_profile(profiles: Sequence[Profile]) -> Profile:
    """The mean of profiles of several prompts, which have the same settings."""
    first = profiles[0]
    spectra = {i: torch.stack([p.spectra[i] for p in profiles]).mean(0) for i in first.spectra}
    return Profile(spectra, first.rope, first.pre_channels, first.query_weighted, first.num_tokens)
