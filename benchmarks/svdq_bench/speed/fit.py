"""Fitting and packing one layer's prompt, against the singular value decomposition it stands for.

Keys are synthetic; the prefill that they are compared with is a count of operations at the rate of
matrix products that torch reaches in the same run. No model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq import _C, ops
from svdq.fit.bases import fit_bases
from svdq.fit.pre_channels import PreChannels
from svdq.layout import PAGE_TOKENS
from svdq.store.packed import PackedStore
from svdq_bench.speed.memory import peak_growth
from svdq_bench.speed.models import ModelShape
from svdq_bench.speed.shape import Shape, page_layout, synthetic_keys
from svdq_bench.speed.timing import Timing, time_interleaved

STAGES = ("fit_basis", "fit_quantizer", "pack_keys", "pack_values")
GEMM_SIZE = 4096  # rows and columns of the matrices whose product gives the rate
SVD = "torch.linalg.svd float32"
COVARIANCE = "torch covariance, linalg.eigh"


@dataclass
class Prompt:
    """One layer's keys and values, [H, T, D], and what packs them as ``rope`` says."""

    keys: Tensor
    values: Tensor
    store: PackedStore
    table: Tensor
    errors: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: the layer's full cache."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def pre_channels(self) -> PreChannels | None:
        """The pre-RoPE channels that :func:`svdq.fit.bases.fit_bases` takes."""
        return PreChannels.of(self.store.layout, self.store.codec.inv_freq)

    def new_store(self) -> PackedStore:
        """An empty store like the prompt's own."""
        store = PackedStore(self.store.layout, 1, self.keys.dtype, self.keys.device)
        store.set_frequencies(self.store.codec.inv_freq)
        return store


def make_prompt(
    keys: Tensor, values: Tensor, schedule: Sequence[int], rope: str, v_bits: int
) -> Prompt:
    """A prompt whose store is fitted and has room for its pages."""
    heads, tokens, dim = keys.shape
    shape = Shape(heads, heads, dim, tokens + 1, 0, 1)
    store = PackedStore(page_layout(shape, schedule, rope, v_bits), 1, keys.dtype, keys.device)
    if rope != "post":
        store.set_frequencies(shape.inv_freq)
    store.fit(0, keys, 0, clip=True)
    pages = -(-tokens // PAGE_TOKENS)
    store.pool.reserve(pages)
    table = torch.arange(pages, dtype=torch.int32)
    return Prompt(keys, values, store, table, torch.empty(keys.shape[:2]))


def stage_calls(prompt: Prompt) -> dict[str, Callable[[int], object]]:
    """The functions that fit and pack a prompt, by stage and as the cache does, and an append."""
    keys, values, store = prompt.keys, prompt.values, prompt.store
    layout, inv_freq = store.layout, store.codec.inv_freq
    bases = fit_bases(keys, prompt.pre_channels, inv_freq=inv_freq)
    next_keys, next_values = keys[:, :PAGE_TOKENS], values[:, :PAGE_TOKENS]
    next_errors = torch.empty(next_keys.shape[:2])

    def pack(some: Tensor, errors: Tensor | None) -> None:
        codec = store.codec.sequence(0)
        ops.pack_keys_(store.pool.k_pages, some, codec, layout, prompt.table, 0, errors=errors)

    def append(index: int) -> None:
        pack(next_keys, next_errors)
        ops.pack_values_(store.pool.v_pages, next_values, layout, prompt.table, 0)

    return {
        "fit_basis": lambda index: fit_bases(keys, prompt.pre_channels, inv_freq=inv_freq),
        "fit_quantizer": lambda index: store.fit(0, keys, 0, clip=True, bases=bases),
        "pack_keys": lambda index: pack(keys, None),
        "pack_values": lambda index: ops.pack_values_(
            store.pool.v_pages, values, layout, prompt.table, 0
        ),
        "as the cache does": lambda index: compress(prompt),
        "append 64 tokens": append,
    }


def compress(prompt: Prompt) -> PackedStore:
    """Fit and pack a prompt as the cache does: into pages of its own, with the errors of keys."""
    store = prompt.new_store()
    store.fit(0, prompt.keys, 0, clip=True)
    store.pack(0, prompt.keys, prompt.values)
    return store


def torch_calls(keys: Tensor) -> dict[str, Callable[[int], object]]:
    """The same decomposition in torch: of the keys themselves, and of their covariance."""
    centred = keys.float() - keys.float().mean(dim=1, keepdim=True)

    def covariance(index: int) -> object:
        some = keys.float()
        some = some - some.mean(dim=1, keepdim=True)
        return torch.linalg.eigh(some.mT @ some)

    return {
        SVD: lambda index: torch.linalg.svd(centred, full_matrices=False),
        COVARIANCE: covariance,
    }


def gemm_calls(size: int) -> dict[str, Callable[[int], object]]:
    """Products of square matrices in the dtypes that a model may run in."""
    matrix = torch.randn(size, size)
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = matrix.to(dtype), matrix.mT.contiguous().to(dtype)
        calls[f"torch.matmul {str(dtype).removeprefix('torch.')}"] = lambda index, a=a, b=b: a @ b
    return calls


def bench_fit(
    model: ModelShape,
    kv_len: int,
    schedule: Sequence[int],
    ropes: Sequence[str] = ("post", "pre", "hybrid"),
    *,
    v_bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 7,
    gemm_size: int = GEMM_SIZE,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Time fitting and packing one layer, and what it is compared with, in the same rounds.

    Parameters
    ----------
    model : gives the keys' heads and size, and the operations of a layer's prefill.
    kv_len : tokens of the prompt.
    schedule : bits of equal groups of latent channels.
    ropes : where keys are coded, the stages of each.
    v_bits : bits a value.
    dtype : of keys and values.
    repeats : timed rounds; every round calls every case once.
    gemm_size : of the matrices whose product gives the rate of operations.
    begin : called with the name of every step as it begins: one, then ``repeats + WARMUP``, then
        one a rope.

    Returns
    -------
    Rows: case, ms (median), best_ms; for what works on the keys speedup_vs_svd, keys_gbytes_per_s
    (bytes of the keys over the time), bandwidth_fraction (of a loop that reads the keys) and
    fraction_of_prefill (of a layer's operations at the best rate of the two products); gflops of
    the products; for the whole as the cache does peak_fraction, the memory it adds at most, its
    pages included, over the layer's full cache.
    """
    begin("keys")
    heads, dim = model.num_kv_heads, model.head_dim
    keys = synthetic_keys(Shape(heads, heads, dim, kv_len + 1, 0, 1)).to(dtype)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        prompts = {rope: make_prompt(keys, values, schedule, rope, v_bits) for rope in ropes}
        calls = torch_calls(keys) | gemm_calls(gemm_size)
        flat = keys.view(torch.uint8).flatten()
        calls["read the keys"] = lambda index: _C.read_pass(flat)
        for rope, prompt in prompts.items():
            calls |= {f"{name}, {rope}": call for name, call in stage_calls(prompt).items()}
        timings = time_interleaved(calls, repeats, begin=begin)
        peaks = {}
        for rope, prompt in prompts.items():
            begin(f"memory, {rope}")
            peaks[rope] = peak_growth(lambda prompt=prompt: compress(prompt)) / prompt.nbytes
    for rope in ropes:
        stages = [timings[f"{name}, {rope}"].seconds for name in STAGES]
        together = tuple(sum(seconds) for seconds in zip(*stages, strict=True))
        timings[f"fit and pack together, {rope}"] = Timing(together)
    return _rows(model, keys, ropes, timings, peaks, gemm_size, list(schedule), v_bits)


def _rows(
    model: ModelShape,
    keys: Tensor,
    ropes: Sequence[str],
    timings: dict[str, Timing],
    peaks: dict[str, float],
    gemm_size: int,
    schedule: list[int],
    v_bits: int,
) -> list[dict]:
    heads, tokens, dim = keys.shape
    rates = {
        name: 2 * gemm_size**3 / timing.median_ms / 1e6
        for name, timing in timings.items()
        if name.startswith("torch.matmul")
    }
    prefill_ms = model.prefill_flops(tokens) / max(rates.values()) / 1e6
    names = [SVD, COVARIANCE, *rates, "read the keys"]
    for rope in ropes:
        order = (*STAGES, "fit and pack together", "as the cache does", "append 64 tokens")
        names += [f"{name}, {rope}" for name in order]
    facts = {
        "kv_len": tokens,
        "num_kv_heads": heads,
        "head_dim": dim,
        "dtype": str(keys.dtype).removeprefix("torch."),
        "schedule": schedule,
        "v_bits": v_bits,
        "prefill_layer_ms": prefill_ms,
    }
    rows = []
    for name in names:
        ms = timings[name].median_ms
        row = {"benchmark": "fit", "case": name, "ms": ms, "best_ms": timings[name].best_ms}
        if name in rates:
            row["gflops"] = rates[name]
        elif not name.startswith("append"):
            row["keys_gbytes_per_s"] = keys.nbytes / ms / 1e6
            row["bandwidth_fraction"] = timings["read the keys"].median_ms / ms
            row["fraction_of_prefill"] = ms / prefill_ms
        if "keys_gbytes_per_s" in row and name != "read the keys":
            row["speedup_vs_svd"] = timings[SVD].median_ms / ms
        case, _, rope = name.rpartition(", ")
        if case == "as the cache does":
            row["peak_fraction"] = peaks[rope]
        rows.append(row | facts)
    return rows
