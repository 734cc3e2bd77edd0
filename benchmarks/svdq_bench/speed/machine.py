"""The machine and the versions that numbers were taken with."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from importlib import metadata
from pathlib import Path

CACHE_INFO = Path("/sys/devices/system/cpu/cpu0/cache")
CPU_INFO = Path("/proc/cpuinfo")


def describe() -> dict[str, str | int | None]:
    """Describe processor, memory and versions, to be stored with every measured number."""
    import torch

    from svdq import _C

    return describe_machine() | {
        "threads": torch.get_num_threads(),
        "backend": _C.backend(),
        "svdq": package_version("svdq"),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
    }


def describe_machine() -> dict[str, str | int | None]:
    """The facts of :func:`describe` without torch; ``threads`` are the processors to run on."""
    return {
        "cpu": cpu_name(),
        "threads": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """Name of the processor, as the operating system gives it."""
    try:
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_level_cache_bytes(folder: Path = CACHE_INFO) -> int | None:
    """Size of the largest cache of the first core, or None where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(sizes, default=None)


def torch_version() -> str | None:
    """torch's own version, which names its CUDA release, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^__version__ = '([^']+)'", text, re.M)
    return found[1] if found else package_version("torch")


def package_version(name: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
