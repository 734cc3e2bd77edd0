"""Timing on a GPU: graphs that are replayed, events around them, and every kernel of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from svdq import _C
from svdq_bench.speed.timing import WARMUP, Timing, take_turns

DEVICES = ("cpu", "cuda")


def check_device(device: str) -> None:
    """Refuse a device that is none, or that this machine or build does not have."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {DEVICES}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU here")
    if device == "cuda" and not _C.BUILT_WITH_CUDA:
        raise ValueError("this build of svdq has no CUDA kernels: build with SVDQ_CUDA=1")


def device_columns(device: str) -> dict[str, str]:
    """The columns of rows that were measured on a device: a GPU's name, of a CPU none."""
    return {"device": torch.cuda.get_device_name()} if device == "cuda" else {}


def capture(call: Callable[[int], object], copies: int) -> torch.cuda.CUDAGraph:
    """A graph of one call over each of its copies of the data, after calls that warm up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in range(copies):
            call(index)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(copies):
            call(index)
    return graph


def time_graphs(
    calls: dict[str, Callable[[int], object]],
    copies: dict[str, int],
    repeats: int,
    begin: Callable[[str], None] = lambda step: None,
) -> dict[str, Timing]:
    """Seconds of one call of each case, by events around replays of graphs that take turns.

    Parameters
    ----------
    calls : name to function, which is given the number of the copy to use.
    copies : copies of each case's data, more than the L2 cache holds together.
    repeats, begin : as for :func:`svdq_bench.speed.timing.time_interleaved`.
    """
    graphs = {name: capture(call, copies[name]) for name, call in calls.items()}

    def measure(name: str, _: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs[name].replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / copies[name]

    return take_turns(list(calls), measure, repeats, WARMUP, begin)


def copy_rate(num_bytes: int, repeats: int = 10) -> float:
    """GB/s that a copy within the device moves, what it reads and what it writes together."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timings = time_graphs({"copy": lambda index: target.copy_(source)}, {"copy": 1}, repeats)
    return 2 * num_bytes / timings["copy"].median_ms / 1e6


def kernel_times(call: Callable[[int], object]) -> dict[str, float]:
    """Microseconds on the device of every kernel of one call, by name."""
    call(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call(0)
        torch.cuda.synchronize()
    events = record.key_averages()
    return {x.key: x.self_device_time_total for x in events if x.self_device_time_total}
