"""One decode step: attention over packed pages against torch's scaled dot product attention.

All cases run in one process, interleaved, each rotating among several copies ("layers") of its keys
and values so that a call finds as little of them in a cache as a decode step of a whole model
would. On a GPU a call is a part of a CUDA graph that holds one over every copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from svdq import _C, ops
from svdq.ops import Window
from svdq.store.packed import PackedStore
from svdq_bench.speed import ggml, gpu, machine
from svdq_bench.speed.gpu_peers import find_peers, peer_call
from svdq_bench.speed.shape import Shape, page_layout, synthetic_keys
from svdq_bench.speed.timing import Timing, time_interleaved


@dataclass(frozen=True)
class Variants:
    """The caches to time over one shape.

    Parameters
    ----------
    schedule : bits of equal groups of latent channels.
    ropes : where keys are coded, one case each and dtype.
    v_bits : bits a value, one case each; named in cases where there are several.
    dtypes : those of queries, window and torch's keys and values.
    """

    schedule: Sequence[int]
    ropes: Sequence[str] = ("post", "pre")
    v_bits: Sequence[int] = (4,)
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)


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


def packed_case(
    shape: Shape,
    schedule: Sequence[int],
    rope: str,
    v_bits: int,
    dtype: torch.dtype,
    working_set_bytes: int = 0,
    device: str = "cpu",
) -> Case:
    """``svdq`` attention over pages that its own operators packed."""
    dim, batch = shape.head_dim, shape.batch
    layout = page_layout(shape, schedule, rope, v_bits)
    store = PackedStore(layout, batch, dtype, torch.device(device))
    store.set_frequencies(None if rope == "post" else shape.inv_freq.to(device))
    for b in range(batch):
        keys = synthetic_keys(shape, 2 * b, device)
        generator = torch.Generator(device).manual_seed(2 * b + 1)
        values = torch.randn(keys.shape, generator=generator, device=device)
        store.fit(b, keys, 0, clip=True)
        store.pack(b, keys, values)

    exact_tokens = shape.sink_tokens + shape.residual_length
    window_lens = torch.full((batch,), exact_tokens, dtype=torch.int32, device=device)
    exact = torch.randn(2, batch, shape.num_kv_heads, exact_tokens, dim).to(device, dtype)
    query = torch.randn(batch, shape.num_qo_heads, 1, dim).to(device, dtype)
    packed, codec = store.packed_keys(shape.sink_tokens), store.codec
    names = tuple(codec.tensors())
    tensors = (packed.k_pages, packed.v_pages, *exact, *codec.tensors().values())
    layers = copies_of(tensors, working_set_bytes)

    def call(index: int) -> Tensor:
        k_pages, v_pages, window_keys, window_values, *rest = layers[index % len(layers)]
        own = replace(codec, **dict(zip(names, rest, strict=True)))
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
    """``scaled_dot_product_attention`` over keys and values in full, [B, H, kv_len, D].

    ``enable_gqa`` is the call that transformers makes; with ``folded`` the query heads of a KV head
    become the rows of one query, which reads every key once and is the fastest formulation known.
    """
    query = torch.randn(shape.batch, shape.num_qo_heads, 1, shape.head_dim)
    query = query.to(layers[0][0].device, dtype)
    if folded:
        query = query.view(shape.batch, shape.num_kv_heads, -1, shape.head_dim)

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
    variants: Variants,
    repeats: int = 30,
    working_set_bytes: int | None = None,
    begin: Callable[[str], None] = lambda step: None,
    device: str = "cpu",
) -> list[dict]:
    """Time one decode step in every formulation, and plain reading of memory, in the same run.

    Parameters
    ----------
    shape : heads, head_dim and kv_len.
    variants : caches to time.
    repeats : timed rounds; every round calls every case once.
    working_set_bytes : bytes that a case's copies take together, at least; None for twice the
        last-level cache and no less than 300 MB.
    begin : called with the name of every step as it begins: one, then ``repeats + WARMUP``.
    device : ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    Rows: case, ms (median), best_ms, ns_per_token (and KV head), bytes and gbytes_per_s (1e9) of
    one call, speedup_vs_torch_best and speedup_vs_enable_gqa (torch's fastest of all formulations
    and dtypes, and the call transformers makes, in this case's dtype), bandwidth_fraction (of the
    read loop over a buffer far larger than the caches), bandwidth_fraction_same_size (of the read
    loop over a buffer of this case's bytes, over and over), copies. On a GPU a copy of a large
    buffer stands for the read loop, both of its sides counted, nothing is of the same size, and
    kernel_us holds the microseconds of every kernel of one call.

    Raises
    ------
    ValueError
        For another device, or ``"cuda"`` where there is none or the build has no CUDA kernels.
    """
    gpu.check_device(device)
    if working_set_bytes is None:
        working_set_bytes = max(300_000_000, 2 * (machine.last_level_cache_bytes() or 0))
    begin("packing")
    cases = _build_cases(shape, variants, working_set_bytes, device)
    calls = {name: case.call for name, case in cases.items()}
    with torch.inference_mode():
        if device == "cpu":
            memory = torch.ones(working_set_bytes, dtype=torch.uint8)
            calls["read"] = lambda index: _C.read_pass(memory)
            timings = time_interleaved(calls, repeats, begin=begin)
            read_rate = memory.nbytes / timings.pop("read").median_ms / 1e6
            further = {
                name: {"bandwidth_fraction_same_size": _rate(case, timings[name]) / same}
                for name, case in cases.items()
                for same in [_read_rate(case.num_bytes)]
            }
        else:
            copies = {name: case.copies for name, case in cases.items()}
            timings = gpu.time_graphs(calls, copies, repeats, begin)
            read_rate = gpu.copy_rate(working_set_bytes)
            further = {
                name: {"kernel_us": gpu.kernel_times(call), **gpu.device_columns(device)}
                for name, call in calls.items()
            }
    rows = _rows(shape, cases, timings, read_rate)
    return [row | further[row["case"]] for row in rows]


def _build_cases(
    shape: Shape, variants: Variants, working_set: int, device: str
) -> dict[str, Case]:
    cases = {}
    for dtype in variants.dtypes:
        name = str(dtype).removeprefix("torch.")
        size = (2, shape.batch, shape.num_kv_heads, shape.kv_len, shape.head_dim)
        layers = copies_of(torch.randn(size, device=device).to(dtype).unbind(), working_set)
        cases[f"torch enable_gqa {name}"] = torch_case(shape, dtype, False, layers)
        cases[f"torch folded {name}"] = torch_case(shape, dtype, True, layers)
        if device != "cpu" and dtype != torch.float32:
            for peer, attend in find_peers().items():
                call = peer_call(attend, layers, shape.num_qo_heads)
                cases[f"{peer} {name}"] = replace(cases[f"torch folded {name}"], call=call)
        for rope in variants.ropes:
            for bits in variants.v_bits:
                words = f"{rope}, {bits}-bit values" if len(variants.v_bits) > 1 else rope
                schedule = variants.schedule
                case = packed_case(shape, schedule, rope, bits, dtype, working_set, device)
                cases[f"svdq {words} {name}"] = case
    if device == "cpu" and shape.batch == 1 and ggml.missing() is None:
        for cache_type in ggml.CACHE_TYPES:
            cases[f"ggml {cache_type}"] = ggml_case(shape, cache_type, working_set)
    return cases


def _rows(
    shape: Shape, cases: dict[str, Case], timings: dict[str, Timing], read_rate: float
) -> list[dict]:
    torch_best = min(t.median_ms for name, t in timings.items() if name.startswith("torch"))
    rows, tokens = [], shape.batch * shape.kv_len
    for name, case in cases.items():
        timing = timings[name]
        # A case without a torch dtype of its own is compared with the first one's.
        gqa_name = f"torch enable_gqa {name.rsplit(' ', 1)[1]}"
        gqa = timings.get(gqa_name, next(iter(timings.values()))).median_ms
        rate = _rate(case, timing)
        rows.append(
            {
                "benchmark": "attend",
                "case": name,
                "k_bits": case.k_bits,
                "v_bits": case.v_bits,
                "ms": timing.median_ms,
                "best_ms": timing.best_ms,
                "ns_per_token": timing.median_ms * 1e6 / tokens / shape.num_kv_heads,
                "bytes": case.num_bytes,
                "gbytes_per_s": rate,
                "speedup_vs_torch_best": torch_best / timing.median_ms,
                "speedup_vs_enable_gqa": gqa / timing.median_ms,
                **_against_ggml(timing, timings),
                "bandwidth_fraction": rate / read_rate,
                "read_gbytes_per_s": read_rate,
                "copies": case.copies,
                **shape.__dict__,
            }
        )
    return rows


def _rate(case: Case, timing: Timing) -> float:
    """GB/s of what a call has to read."""
    return case.num_bytes / timing.median_ms / 1e6


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
