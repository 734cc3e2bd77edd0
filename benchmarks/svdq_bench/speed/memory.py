"""Peak memory of a call as the operating system counts it: tensors, scratch and all else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

PROC = Path("/proc/self")


def resident_bytes(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now (``VmRSS``) or at most so far (``VmHWM``)."""
    for line in (PROC / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{PROC / 'status'} has no {field}")


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the process outgrew its size of before while ``call`` ran; Linux and glibc."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that it hides no growth
    (PROC / "clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident_bytes()
    held = call()  # counts until the peak is read
    peak = resident_bytes("VmHWM")
    del held
    return peak - before
