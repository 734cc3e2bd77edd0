"""``svdq info``: what is installed and what this machine can run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from svdq_bench.cli.errors import reports_errors


@reports_errors
def info() -> None:
    """Show versions, the packed format and the backends usable on this machine."""
    from svdq import _C
    from svdq_bench.speed import machine

    facts = machine.describe()
    cache_bytes = facts["last_level_cache_bytes"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    rows = {
        "svdq": facts["svdq"] or "not installed as a distribution",
        "packed format": f"version {_C.format.VERSION}, {_C.format.PAGE_TOKENS} tokens a page",
        "backend": f"{_C.backend()} (usable: {', '.join(_C.backends())}; SVDQ_BACKEND chooses one)",
        "CUDA kernels": _cuda_state(),
        "processor": f"{facts['cpu']}, {facts['threads']} threads",
        "memory": f"{facts['memory_bytes'] / 1e9:.1f} GB"
        + (f", last-level cache {cache_bytes / 1e6:.0f} MB" if cache_bytes else ""),
        "torch": facts["torch"],
        "transformers": facts["transformers"] or "not installed (needed for demo and eval)",
        "python": facts["python"],
    }
    for name, value in rows.items():
        grid.add_row(name, str(value))
    Console().print(grid)


def _cuda_state() -> str:
    """Whether CUDA tensors can be used, and where not, why."""
    import torch

    from svdq import _C

    if not _C.BUILT_WITH_CUDA:
        return "not in this build"
    if not torch.cuda.is_available():
        return "in this build; no device found"
    return f"in this build; device: {torch.cuda.get_device_name()}"
