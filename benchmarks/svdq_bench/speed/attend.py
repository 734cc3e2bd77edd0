"""One decode step: attention over packed pages against torch's scaled dot product attention.

All cases run in one process, interleaved, each rotating among several copies ("layers") of its keys
and values so that a call finds as little of them in a cache as a decode step of a whole model
would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from svdq import _C, ops
from svdq.config.bands import scheduled_bands
from svdq.layout import PageLayout
from svdq.ops import Window
from svdq.store.packed import PackedStore
from svdq_bench.speed import ggml, machine
from svdq_bench.speed.timing import Timing, time_interleaved

PRE_CHANNELS = 8  # of rope="hybrid"
TORCH_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Shape:
    """One decode step of one layer, batch 1.

    Parameters
    ----------
    num_qo_heads, num_kv_heads, head_dim : heads and their size.
    kv_len : tokens in the cache, all of them seen by the query.
    sink_tokens, residual_length : tokens of them that are held exact, first and last.
    rope_theta : base of the rotary frequencies; the larger, the fewer pairs are fast, whose keys
        have to be reconstructed before RoPE.
    """

    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    kv_len: int = 32768
    sink_tokens: int = 8
    residual_length: int = 64
    rope_theta: float = 5e5

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_qo_heads % self.num_kv_heads:
            raise ValueError(
                "num_qo_heads must be a multiple of num_kv_heads, got "
                f"{self.num_qo_heads} and {self.num_kv_heads}"
            )
        if self.kv_len <= self.sink_tokens + self.residual_length:
            raise ValueError(
                f"kv_len must exceed the exact tokens, {self.sink_tokens} + "
                f"{self.residual_length}, got {self.kv_len}"
            )

    @property
    def inv_freq(self) -> Tensor:
        """Rotary frequencies [head_dim / 2] float32."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32)
        return 1.0 / self.rope_theta ** (pairs / self.head_dim)

    @property
    def packed_tokens(self) -> int:
        """Slots in packed pages (the sinks' slots among them)."""
        return self.kv_len - self.residual_length


@dataclass(frozen=True)
class Case:
    """One way to attend.

    Parameters
    ----------
    call : does it once; given the number of the round.
    num_bytes : what one call has to read.
    copies : copies of the data that rounds rotate among.
    k_bits, v_bits : code bits per key and value number.
    """

    call: Callable[[int], object]
    num_bytes: int
    copies: int
    k_bits: float
    v_bits: float


def synthetic_keys(shape: Shape, seed: int = 0) -> Tensor:
    """Keys whose latent channels decay as a model's do: [H, packed_tokens, D] float32."""
    generator = torch.Generator().manual_seed(seed)
    heads, tokens, dim = shape.num_kv_heads, shape.packed_tokens, shape.head_dim
    spread = torch.exp(torch.arange(dim) * (-8.0 / dim))
    latent = torch.randn(heads, tokens, dim, generator=generator) * spread
    basis, _ = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))
    return latent @ basis.mT + torch.randn(heads, 1, dim, generator=generator)


def page_layout(shape: Shape, schedule: Sequence[int], rope: str, v_bits: int) -> PageLayout:
    """Layout of the pages to attend over; ``ValueError`` for shapes that pages cannot have."""
    dim, heads = shape.head_dim, shape.num_kv_heads
    hybrid = rope in ("hybrid", "rotated-mean")
    pre, post = scheduled_bands(dim, schedule, PRE_CHANNELS if rope == "hybrid" else 0)
    return PageLayout(
        dim,
        (post,) * heads,
        "hybrid" if hybrid else rope,
        v_bits,
        pre_bands=(pre,) * heads if hybrid else (),
    )


def packed_case(
    shape: Shape,
    schedule: Sequence[int],
    rope: str,
    v_bits: int,
    dtype: torch.dtype,
    working_set_bytes: int = 0,
) -> Case:
    """``svdq`` attention over pages that its own operators packed."""
    keys = synthetic_keys(shape)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    dim = shape.head_dim
    inv_freq = None if rope == "post" else shape.inv_freq
    store = PackedStore(page_layout(shape, schedule, rope, v_bits), 1, dtype, keys.device)
    store.set_frequencies(inv_freq)
    store.fit(0, keys, 0, clip=True)
    store.pack(0, keys, values)

    exact_tokens = shape.sink_tokens + shape.residual_length
    window_lens = torch.tensor([exact_tokens], dtype=torch.int32)
    exact = torch.randn(2, 1, shape.num_kv_heads, exact_tokens, dim).to(dtype)
    query = torch.randn(1, shape.num_qo_heads, 1, dim).to(dtype)
    packed, codec = store.packed_keys(shape.sink_tokens), store.codec
    tensors = (packed.k_pages, packed.v_pages, codec.basis, codec.scale, codec.mean, *exact)
    layers = copies_of(tensors, working_set_bytes)

    def call(index: int) -> Tensor:
        k_pages, v_pages, basis, scale, mean, window_keys, window_values = layers[
            index % len(layers)
        ]
        own = replace(codec, basis=basis, scale=scale, mean=mean)
        out, _ = ops.attend(
            query,
            replace(packed, codec=own, k_pages=k_pages, v_pages=v_pages),
            Window(window_keys, window_values, window_lens),
            dim**-0.5,
        )
        return out

    return Case(call, num_bytes(tensors), len(layers), store.layout.k_bits, v_bits)


def torch_case(
    shape: Shape, dtype: torch.dtype, folded: bool, layers: Sequence[Sequence[Tensor]]
) -> Case:
    """``scaled_dot_product_attention`` over keys and values in full.

    ``enable_gqa`` is the call that transformers makes; with ``folded`` the query heads of a KV head
    become the rows of one query, which reads every key once and is the fastest formulation known.
    """
    query = torch.randn(1, shape.num_qo_heads, 1, shape.head_dim).to(dtype)
    if folded:
        query = query.view(1, shape.num_kv_heads, -1, shape.head_dim)

    def call(index: int) -> Tensor:
        keys, values = layers[index % len(layers)]
        return scaled_dot_product_attention(query, keys, values, enable_gqa=not folded)

    number_bits = 8 * dtype.itemsize
    return Case(call, num_bytes(layers[0]), len(layers), number_bits, number_bits)


def ggml_case(shape: Shape, cache_type: str, working_set_bytes: int = 0) -> Case:
    """llama.cpp's flash attention over a cache of one of its types."""
    query = torch.randn(shape.num_qo_heads, shape.head_dim)
    keys, values = torch.randn(2, shape.num_kv_heads, shape.kv_len, shape.head_dim)
    call, read, copies = ggml.ggml_call(query, keys, values, cache_type, working_set_bytes)
    bits = ggml.CACHE_TYPES[cache_type][1]
    return Case(call, read, copies, bits, bits)


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of some tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def copies_of(tensors: Sequence[Tensor], working_set_bytes: int) -> list[tuple[Tensor, ...]]:
    """As many copies as take ``working_set_bytes`` together, at least one."""
    count = max(1, -(-working_set_bytes // num_bytes(tensors)))
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def bench_attend(
    shape: Shape,
    schedule: Sequence[int],
    ropes: Sequence[str] = ("post", "pre"),
    v_bits: Sequence[int] = (4,),
    repeats: int = 30,
    working_set_bytes: int | None = None,
    begin: Callable[[str], None] = lambda step: None,
    dtypes: Sequence[torch.dtype] = TORCH_DTYPES,
) -> list[dict]:
    """Time one decode step in every formulation, and plain reading of memory, in the same run.

    Parameters
    ----------
    shape : heads, head_dim and kv_len.
    schedule : bits of equal groups of latent channels.
    ropes : where keys are coded, one case each and dtype.
    v_bits : bits a value, one case each; named in cases where there are several.
    repeats : timed rounds; every round calls every case once.
    working_set_bytes : bytes that a case's copies take together, at least; None for twice the
        last-level cache and no less than 300 MB.
    begin : called with the name of every step as it begins: one, then ``repeats + WARMUP``.
    dtypes : those of queries, window and torch's keys and values.

    Returns
    -------
    Rows: case, ms (median), best_ms, ns_per_token (and KV head), bytes and gbytes_per_s (1e9) of
    one call, speedup_vs_torch_best and speedup_vs_enable_gqa (torch's fastest of all formulations
    and dtypes, and the call transformers makes, in this case's dtype), bandwidth_fraction (of the
    read loop over a buffer far larger than the caches), bandwidth_fraction_same_size (of the read
    loop over a buffer of this case's bytes, over and over), copies.
    """
    if working_set_bytes is None:
        working_set_bytes = max(300_000_000, 2 * (machine.last_level_cache_bytes() or 0))
    begin("packing")
    cases = _build_cases(shape, schedule, ropes, v_bits, working_set_bytes, dtypes)
    memory = torch.ones(working_set_bytes, dtype=torch.uint8)
    calls = {name: case.call for name, case in cases.items()}
    calls["read"] = lambda index: _C.read_pass(memory)
    with torch.inference_mode():
        timings = time_interleaved(calls, repeats, begin=begin)
    read_rate = memory.nbytes / timings.pop("read").median_ms / 1e6
    return _rows(shape, cases, timings, read_rate)


def _build_cases(
    shape: Shape,
    schedule: Sequence[int],
    ropes: Sequence[str],
    v_bits: Sequence[int],
    working_set: int,
    dtypes: Sequence[torch.dtype],
) -> dict[str, Case]:
    cases = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        size = (2, 1, shape.num_kv_heads, shape.kv_len, shape.head_dim)
        layers = copies_of(torch.randn(size).to(dtype).unbind(), working_set)
        cases[f"torch enable_gqa {name}"] = torch_case(shape, dtype, False, layers)
        cases[f"torch folded {name}"] = torch_case(shape, dtype, True, layers)
        for rope in ropes:
            for bits in v_bits:
                words = f"{rope}, {bits}-bit values" if len(v_bits) > 1 else rope
                case = packed_case(shape, schedule, rope, bits, dtype, working_set)
                cases[f"svdq {words} {name}"] = case
    if ggml.missing() is None:
        for cache_type in ggml.CACHE_TYPES:
            cases[f"ggml {cache_type}"] = ggml_case(shape, cache_type, working_set)
    return cases


def _rows(
    shape: Shape, cases: dict[str, Case], timings: dict[str, Timing], read_rate: float
) -> list[dict]:
    torch_best = min(t.median_ms for name, t in timings.items() if name.startswith("torch"))
    rows = []
    for name, case in cases.items():
        timing = timings[name]
        # A case without a torch dtype of its own is compared with the first one's.
        gqa_name = f"torch enable_gqa {name.rsplit(' ', 1)[1]}"
        gqa = timings.get(gqa_name, next(iter(timings.values()))).median_ms
        rate = case.num_bytes / timing.median_ms / 1e6
        rows.append(
            {
                "benchmark": "attend",
                "case": name,
                "k_bits": case.k_bits,
                "v_bits": case.v_bits,
                "ms": timing.median_ms,
                "best_ms": timing.best_ms,
                "ns_per_token": timing.median_ms * 1e6 / shape.kv_len / shape.num_kv_heads,
                "bytes": case.num_bytes,
                "gbytes_per_s": rate,
                "speedup_vs_torch_best": torch_best / timing.median_ms,
                "speedup_vs_enable_gqa": gqa / timing.median_ms,
                **_against_ggml(timing, timings),
                "bandwidth_fraction": rate / read_rate,
                "bandwidth_fraction_same_size": rate / _read_rate(case.num_bytes),
                "read_gbytes_per_s": read_rate,
                "copies": case.copies,
                **shape.__dict__,
            }
        )
    return rows


def _against_ggml(timing: Timing, timings: dict[str, Timing]) -> dict[str, float]:
    """Ratios against ggml's caches, where they were timed."""
    return {
        f"speedup_vs_ggml_{name}": timings[f"ggml {name}"].median_ms / timing.median_ms
        for name in ggml.CACHE_TYPES
        if f"ggml {name}" in timings
    }


def _read_rate(num_bytes: int, repeats: int = 10) -> float:
    """GB/s of reading one buffer again and again: the limit if the data stays in a cache."""
    memory = torch.ones(num_bytes, dtype=torch.uint8)
    timing = time_interleaved({"read": lambda index: _C.read_pass(memory)}, repeats)["read"]
    return num_bytes / timing.median_ms / 1e6
