"""``svdq info``: what is installed and what this machine can run."""

from __future__ import annotations

import subprocess

from rich.console import Console
from rich.table import Table

from svdq_bench.cli.errors import reports_errors


@reports_errors
def info() -> None:
    """Show versions, the packed format and the backends usable on this machine."""
    from svdq_bench import _info  # not svdq: torch takes longer to import than this may
    from svdq_bench.speed import machine

    facts = machine.describe_machine()
    cache_bytes = facts["last_level_cache_bytes"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    usable = ", ".join(_info.backends())
    rows = {
        "svdq": machine.package_version("svdq") or "not installed as a distribution",
        "packed format": f"version {_info.FORMAT_VERSION}, {_info.PAGE_TOKENS} tokens a page",
        "backend": f"{_info.backend()} (usable: {usable}; SVDQ_BACKEND chooses one)",
        "CUDA kernels": _cuda_state(_info.BUILT_WITH_CUDA),
        "processor": f"{facts['cpu']}, {facts['threads']} threads",
        "memory": f"{facts['memory_bytes'] / 1e9:.1f} GB"
        + (f", last-level cache {cache_bytes / 1e6:.0f} MB" if cache_bytes else ""),
        "torch": machine.torch_version() or "not installed",
        "transformers": machine.package_version("transformers") or "not installed",
        "python": facts["python"],
    }
    for name, value in rows.items():
        grid.add_row(name, str(value))
    Console().print(grid)


def _cuda_state(built: bool) -> str:
    """The state of CUDA in this build and machine."""
    if not built:
        return "not in this build"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return "in this build; no device found"
    return f"in this build; device: {', '.join(filter(None, found))}"
