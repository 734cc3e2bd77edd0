"""The choice to compile CUDA kernels or not, the GPU architectures, and the compiler.

``python build_tools/cuda_toolkit.py install`` installs the compiler that fits the installed torch,
if kernels are to be compiled; ``... path`` prints the folder of the toolkit. build_tools/cuda.cmake
drives the compiler.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHANGE = "SVDQ_CUDA=1 or 0 compiles them or not, SVDQ_CUDA_ARCHS=all, native or 80;90 says for what"


class NoToolkit(Exception):
    """The reason, in one line, why there is no CUDA toolkit."""


@dataclass(frozen=True)
class Choice:
    """The architectures to compile for, as cuda.cmake takes them (None: no CUDA), and the reason.

    ``required`` makes a missing compiler an error.
    """

    archs: str | None
    reason: str
    required: bool = False


def has_gpu() -> bool:
    """True if NVIDIA's driver lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def choose() -> Choice:
    """The choice of SVDQ_CUDA and SVDQ_CUDA_ARCHS; without them, this machine's GPU or nothing."""
    cuda = os.environ.get("SVDQ_CUDA", "")
    archs = os.environ.get("SVDQ_CUDA_ARCHS", "").replace(" ", "")
    if cuda not in ("", "0", "1"):
        raise SystemExit(f"SVDQ_CUDA is 0, 1 or unset, got {cuda!r}")
    if cuda == "0":
        return Choice(None, "SVDQ_CUDA=0")
    if archs:
        return Choice(archs, "SVDQ_CUDA_ARCHS", required=True)
    if has_gpu():
        return Choice("native", "this machine's GPU", required=cuda == "1")
    if cuda == "1":
        return Choice("all", "SVDQ_CUDA=1", required=True)
    return Choice(None, f"there is no GPU here; {CHANGE}")


def toolkit_requirement() -> str:
    """The compiler's packages in the version that fits the installed torch.

    torch pins the package cuda-toolkit, whose extras are the parts of one CUDA release; so the
    parts that compile, listed in pyproject.toml without a version, are those of that release.
    """
    import torch

    if torch.version.cuda is None:
        raise NoToolkit(f"torch {torch.__version__} is built without CUDA")
    try:
        version = importlib.metadata.version("cuda-toolkit")
    except importlib.metadata.PackageNotFoundError:
        raise NoToolkit(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not come with the package"
            " cuda-toolkit; newer ones do"
        ) from None
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(r'^cuda-build = \["(cuda-toolkit\[.*?\])"\]', text, re.M)[1] + f"=={version}"


def package_folder() -> Path | None:
    """The folder of torch's own packages of CUDA in the running Python, ``nvidia/cu13``."""
    import torch

    major = (torch.version.cuda or "").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        if (Path(folder) / f"cu{major}").is_dir():
            return Path(folder) / f"cu{major}"
    return None


def find_nvcc() -> Path:
    """The compiler of torch's CUDA release.

    The first of CUDACXX, the running Python's packages, CUDA_HOME and the PATH that has one.
    """
    import torch

    if torch.version.cuda is None:
        raise NoToolkit(f"torch {torch.__version__} is built without CUDA")
    wanted = ".".join(torch.version.cuda.split(".")[:2])
    packages, home = package_folder(), os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        packages and packages / "bin/nvcc",
        home and Path(home) / "bin/nvcc",
        shutil.which("nvcc"),
    ]
    others = []
    for nvcc in [Path(path) for path in candidates if path]:
        if not nvcc.exists():
            continue
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        release = re.search(r"release (\d+\.\d+)", said.stdout)
        if release is not None and release[1] == wanted:
            return nvcc
        others.append(f"{nvcc} is of CUDA {release and release[1]}, torch of {wanted}")
    found = others[0] if others else "nvcc is not installed"
    raise NoToolkit(f"{found}: run `python build_tools/cuda_toolkit.py install`")


def find_compiler() -> tuple[Path, str] | None:
    """The compiler and the architectures to build with, or None; says in one line which and why."""
    choice = choose()
    reason = choice.reason
    if choice.archs is not None:
        try:
            nvcc = find_nvcc()
        except NoToolkit as missing:
            if choice.required:
                raise SystemExit(f"svdq: {reason} asks for CUDA kernels, but {missing}") from None
            reason = str(missing)
        else:
            print(f"svdq: CUDA kernels for {choice.archs} ({reason}); {CHANGE}", flush=True)
            return nvcc, choice.archs
    print(f"svdq: built without CUDA kernels: {reason}", flush=True)
    return None


def install() -> None:
    """Install the compiler with pip if kernels are to be compiled."""
    choice = choose()
    if choice.archs is None:
        return
    try:
        requirement = toolkit_requirement()
    except NoToolkit as reason:
        print(f"svdq: no CUDA compiler installed: {reason}")
        return
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, requirement], check=True)


def main() -> None:
    """Run one command."""
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command == "install":
        install()
    elif command == "path":
        try:
            print(find_nvcc().parent.parent)
        except NoToolkit as reason:
            raise SystemExit(str(reason)) from None
    else:
        raise SystemExit("usage: cuda_toolkit.py install | path")


if __name__ == "__main__":
    main()
