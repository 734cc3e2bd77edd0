"""What a machine has that tools/gpu.sh needs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Tools:
    """What this machine has; None for what it lacks."""

    torch_cuda: str | None
    nvcc: Path | None
    cmake: str | None
    sanitizer: str | None
    ncu: str | None
    gtest: Path | None
    headers: bool
    gpu: str | None
    facts: dict[str, str | None]

    @staticmethod
    def find() -> Tools:
        """Look for all of them."""
        nvcc, said = _find_nvcc()
        gpu = _first_line(["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total",
                           "--format=csv,noheader"])  # fmt: skip
        torch_cuda = _torch_cuda()
        gtest = os.environ.get("SVDQ_GTEST_DIR")
        facts = {
            "gpu": gpu,
            "python": sys.version.split()[0],
            **{name: _version(name) for name in ("torch", "transformers", "pytest", "setuptools")},
            "torch's CUDA": torch_cuda,
            "nvcc": said,
            "cmake": _first_line(["cmake", "--version"]),
            "g++": _first_line(["g++", "-dumpfullversion"]),
            "commit": _first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        }
        include = sysconfig.get_path("include")
        return Tools(
            torch_cuda,
            nvcc,
            shutil.which("cmake"),
            shutil.which("compute-sanitizer"),
            shutil.which("ncu"),
            Path(gtest) if gtest else None,
            os.path.exists(os.path.join(include, "Python.h")),
            gpu,
            facts,
        )


def _find_nvcc() -> tuple[Path | None, str | None]:
    """The compiler and its release."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = [Path(home) / "bin/nvcc"] if home else []
    found += [Path(x) for x in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if x]
    for nvcc in found:
        if nvcc.exists():
            said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
            release = re.search(r"release (\d+\.\d+)", said.stdout)
            return nvcc, f"CUDA {release[1]}" if release else "unknown release"
    return None, None


def _torch_cuda() -> str | None:
    command = [sys.executable, "-c", "import torch; print(torch.version.cuda or '')"]
    return _first_line(command)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: Sequence[str]) -> str | None:
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    lines = said.stdout.strip().splitlines()
    return lines[0].strip() if said.returncode == 0 and lines else None


def has_header(name: str) -> bool:
    probe = ["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    source = f"#include <{name}>\n"
    return subprocess.run(probe, input=source, text=True, capture_output=True).returncode == 0
