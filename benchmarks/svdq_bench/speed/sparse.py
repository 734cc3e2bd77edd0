"""One decode step that attends to the best tokens alone, against all of them and against torch.

Pages hold random codes, so that the chosen tokens lie anywhere, which is the worst case for memory.
Real keys are chosen closer together: on SmolLM2 the chosen tokens lie in half as many groups of 8
as there are tokens, as they do where neighbours are alike in pairs. All cases take turns in one
process, each rotating among several copies of its keys and values.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from svdq.cache.reads import FULL_BYTES, ReadReport, add_store
from svdq.config.sparsity import DEFAULT_CHANNELS, Sparsity
from svdq.layout import PAGE_TOKENS
from svdq.store.attend import attend_stores
from svdq.store.packed import PackedStore
from svdq.store.window import WindowStore
from svdq_bench.quality.budgets import budget_text
from svdq_bench.speed import machine
from svdq_bench.speed.attend import Case, copies_of, num_bytes, torch_case
from svdq_bench.speed.shape import Shape, page_layout, synthetic_keys
from svdq_bench.speed.timing import Timing, time_interleaved

FIT_TOKENS = 4096  # keys that basis and ranges are fitted on
STAGE_REPEATS = 7  # calls that are split into stages
DTYPE = torch.bfloat16
ALIKE = (1, 2)  # neighbours whose keys are the same


def random_store(
    shape: Shape, schedule: Sequence[int], rope: str, v_bits: int, alike: int = 1
) -> PackedStore:
    """A store of ``shape.packed_tokens`` random codes, decoded by a basis of synthetic keys.

    The keys of every ``alike`` neighbours, a divisor of 16, are the same, so that they are chosen
    together.
    """
    fitted = min(shape.packed_tokens, FIT_TOKENS)
    keys = synthetic_keys(replace(shape, kv_len=fitted + shape.residual_length))
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    store = PackedStore(page_layout(shape, schedule, rope, v_bits), 1, DTYPE, keys.device)
    if rope != "post":
        store.set_frequencies(shape.inv_freq)
    store.fit(0, keys, 0, clip=True)
    store.pack(0, keys, values)
    pages = -(-shape.packed_tokens // PAGE_TOKENS)
    generator = torch.Generator().manual_seed(2)
    size = (pages, store.layout.k_page_bytes)
    pool = store.pool
    pool.k_pages = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    # Neighbours of one 16-token group are neighbouring lanes of 4 bytes, whatever the width.
    lanes = pool.k_pages.view(-1, 16 // alike, alike, 4)
    lanes[:, :, 1:] = lanes[:, :, :1]
    pool.v_pages = pool.v_pages[torch.arange(pages) % len(pool.pages[0])]
    pool.slots = [shape.packed_tokens]
    pool.set_pages([list(range(pages))])
    return store


def exact_rows(shape: Shape) -> WindowStore:
    """Random sinks and window."""
    count = shape.sink_tokens + shape.residual_length
    rows = WindowStore((1, shape.num_kv_heads, shape.head_dim), DTYPE, torch.device("cpu"))
    rows.reserve(count)
    rows.write(0, *torch.randn(2, shape.num_kv_heads, count, shape.head_dim, dtype=DTYPE), 0)
    rows.set_count([count])
    return rows


def step_case(
    shape: Shape,
    stores: Sequence[PackedStore],
    rows: WindowStore,
    query: Tensor,
    sparsity: Sparsity | None,
) -> Case:
    """A decode step over one of the stores, which hold the same; its bytes are those of keys."""

    def call(index: int) -> Tensor:
        store = stores[index % len(stores)]
        scaling = shape.head_dim**-0.5
        options = {"sink_tokens": shape.sink_tokens, "causal": True, "sparsity": sparsity}
        return attend_stores(query, [store], rows, scaling, **options)[0]

    layout = stores[0].layout
    read = key_reads(shape, stores[0], rows, sparsity).total
    return Case(call, read, len(stores), layout.k_bits, layout.v_bits)


def key_reads(
    shape: Shape, store: PackedStore, rows: WindowStore, sparsity: Sparsity | None
) -> ReadReport:
    """Bytes of keys that a step reads."""
    heads, dim, packed = shape.num_kv_heads, shape.head_dim, shape.packed_tokens
    report = ReadReport(full=shape.kv_len * heads * dim * FULL_BYTES, packed=packed)
    report.exact = rows.count[0] * heads * dim * rows.keys.itemsize
    packed -= shape.sink_tokens
    attended = packed if sparsity is None else min(sparsity.tokens(packed), packed)
    report.attended = attended
    add_store(report, store, attended, shape.sink_tokens, sparsity)
    return report


class _OperatorClock(TorchDispatchMode):
    """Notes when each operator begins and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: dict[str, tuple[float, float]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.spans[str(func)] = (start, time.perf_counter())
        return out


def stage_times(call: Callable[[int], object], repeats: int = STAGE_REPEATS) -> dict[str, float]:
    """Milliseconds of the stages of a sparse step, medians over some calls.

    Returns
    -------
    select_ms : until the codes of the chosen tokens begin to be copied; gather_ms : copying them;
    attend_ms : attending to the copies and the window.
    """
    stages = []
    for index in range(repeats):
        with _OperatorClock() as clock:
            start = time.perf_counter()
            call(index)
        gather, attend = (clock.spans[f"svdq.{name}.default"] for name in ("gather", "attend"))
        stages.append((gather[0] - start, gather[1] - gather[0], attend[1] - attend[0]))
    names = ("select_ms", "gather_ms", "attend_ms")
    medians = (statistics.median(times) * 1e3 for times in zip(*stages, strict=True))
    return dict(zip(names, medians, strict=True))


def bench_sparse(
    shape: Shape,
    schedule: Sequence[int],
    budgets: Sequence[int | float] = (1 / 32, 2048),
    *,
    ropes: Sequence[str] = ("post", "pre"),
    v_bits: int = 4,
    channels: int = DEFAULT_CHANNELS,
    repeats: int = 30,
    working_set_bytes: int | None = None,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Time one decode step in bfloat16: torch, svdq over all tokens, and svdq with each budget.

    Parameters
    ----------
    shape : heads, head_dim and kv_len.
    schedule : bits of equal groups of latent channels.
    budgets : packed tokens to attend to, or shares of them; those that are all of them are left
        out.
    ropes : where keys are coded.
    v_bits : bits a value.
    channels : leading channels that choose.
    repeats, working_set_bytes, begin : as for :func:`svdq_bench.speed.attend.bench_attend`.

    Returns
    -------
    Rows of ``"sparse"``, once with random keys and once with neighbours alike in pairs (alike 2):
    case, budget, attended (packed tokens of a KV head), ms (median), best_ms,
    key_bytes (all that a step reads of the keys), code_read_ratio and read_ratio (a full cache's
    bytes in bfloat16 over those of codes alone, and over all), speedup_vs_dense (svdq over all
    tokens, keys coded likewise), speedup_vs_enable_gqa, speedup_vs_torch_best, and select_ms,
    gather_ms and attend_ms, the stages in calls apart from the others.
    """
    if working_set_bytes is None:
        working_set_bytes = max(300_000_000, 2 * (machine.last_level_cache_bytes() or 0))
    begin("packing")
    size = (2, 1, shape.num_kv_heads, shape.kv_len, shape.head_dim)
    layers = copies_of(torch.randn(size, dtype=DTYPE).unbind(), working_set_bytes)
    full = num_bytes(layers[0]) // 2
    cases = {
        "torch enable_gqa": torch_case(shape, DTYPE, False, layers),
        "torch folded": torch_case(shape, DTYPE, True, layers),
    }
    facts: dict[str, dict] = {
        name: {"key_bytes": full, "code_read_ratio": 1.0, "read_ratio": 1.0} for name in cases
    }
    query = torch.randn(1, shape.num_qo_heads, 1, shape.head_dim, dtype=DTYPE)
    rows = exact_rows(shape)
    packed = shape.packed_tokens - shape.sink_tokens
    sparse: dict[str, str] = {}  # case to the dense case that it is compared with
    for rope, alike in itertools.product(ropes, ALIKE):
        store = random_store(shape, schedule, rope, v_bits, alike)
        stores = _copies(store, working_set_bytes)
        dense = f"svdq {rope}, all tokens"
        for budget in (None, *budgets) if alike == 1 else budgets:
            sparsity = None if budget is None else Sparsity(budget, "latent", channels)
            if sparsity is not None and sparsity.tokens(packed) >= packed:
                continue
            name = dense if budget is None else f"svdq {rope}, {budget_text(budget)}"
            name += "" if alike == 1 else ", pairs"
            cases[name] = step_case(shape, stores, rows, query, sparsity)
            report = key_reads(shape, stores[0], rows, sparsity)
            facts[name] = {
                "rope": rope,
                "attended": int(report.attended),
                "key_bytes": report.total,
                "code_read_ratio": report.code_ratio,
                "read_ratio": report.ratio,
            }
            if sparsity is not None:
                sparse[name] = dense
                facts[name] |= {"budget": budget, "channels": channels, "alike": alike}
    with torch.inference_mode():
        calls = {name: case.call for name, case in cases.items()}
        timings = time_interleaved(calls, repeats, begin=begin)
        for name, dense in sparse.items():
            facts[name]["speedup_vs_dense"] = timings[dense].median_ms / timings[name].median_ms
            facts[name] |= stage_times(cases[name].call)
    return [_row(name, cases[name], timings, facts[name], shape) for name in cases]


def _row(
    name: str, case: Case, timings: dict[str, Timing], facts: dict, shape: Shape
) -> dict[str, object]:
    ms = timings[name].median_ms
    torch_best = min(t.median_ms for case, t in timings.items() if case.startswith("torch"))
    return {
        "benchmark": "sparse",
        "case": name,
        "k_bits": case.k_bits,
        "v_bits": case.v_bits,
        "ms": ms,
        "best_ms": timings[name].best_ms,
        "speedup_vs_enable_gqa": timings["torch enable_gqa"].median_ms / ms,
        "speedup_vs_torch_best": torch_best / ms,
        **facts,
        "copies": case.copies,
        **shape.__dict__,
    }


def _copies(store: PackedStore, working_set_bytes: int) -> list[PackedStore]:
    """The store and copies with pages of their own, as many as take so much together."""
    stores = []
    for k_pages, v_pages in copies_of((store.pool.k_pages, store.pool.v_pages), working_set_bytes):
        own = copy.copy(store)
        own.pool = copy.copy(store.pool)
        own.pool.k_pages, own.pool.v_pages = k_pages, v_pages
        stores.append(own)
    return stores
