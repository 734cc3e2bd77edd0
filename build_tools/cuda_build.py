"""The CUDA half of the build: the toolkit that pip installs beside torch, and nvcc's objects.

``python build_tools/cuda_build.py install`` installs the compiler that fits the installed torch,
``... compile`` compiles csrc/cuda, and setup.py does the same for the extension. Nothing here asks
for a GPU.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc/cuda"
OBJECTS = ROOT / "build/cuda-objects"
ARCHITECTURES = "80;86;89;90;100;120;80-virtual"

# The kernels use what sm_80 has, so one PTX text serves every architecture: the same that is run
# where PTX is emulated, translated once per target, at half the time of a front end per target.
PTX = "80"
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-lineinfo",  # source lines for profilers
    "--compress-mode=size",  # a tenth of the bytes
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Werror=all-warnings",
]


class NoToolkit(Exception):
    """Says in one line why there is no CUDA toolkit."""


@dataclass(frozen=True)
class Toolkit:
    """A folder with bin, include and lib, as NVIDIA's pip packages share it."""

    root: Path

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"

    def tool(self, name: str) -> str:
        return str(self.root / "bin" / name)

    def library(self, name: str) -> str:
        """The file name of a library: pip's packages have those with a version alone."""
        found = sorted(self.lib.glob(f"lib{name}.so.[0-9]*"))
        if not found:
            raise NoToolkit(f"{self.lib} has no lib{name}")
        return found[0].name


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


def find_toolkit() -> Toolkit:
    """The toolkit of the running Python's packages, if it can compile for the installed torch."""
    import torch

    toolkit_requirement()
    major, minor = torch.version.cuda.split(".")[:2]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        toolkit = Toolkit(Path(folder) / f"cu{major}")
        if not Path(toolkit.tool("nvcc")).exists():
            continue
        said = subprocess.run([toolkit.tool("nvcc"), "--version"], capture_output=True, text=True)
        release = re.search(r"release (\d+\.\d+)", said.stdout)
        if release is None or release[1] != f"{major}.{minor}":
            raise NoToolkit(
                f"{toolkit.tool('nvcc')} is of CUDA {release and release[1]}, torch of"
                f" {torch.version.cuda}: run `python build_tools/cuda_build.py install`"
            )
        return toolkit
    raise NoToolkit("nvcc is not installed: run `python build_tools/cuda_build.py install`")


def wanted_toolkit() -> Toolkit | None:
    """What SVDQ_CUDA asks for: 0 none, 1 the toolkit or an error, unset the toolkit if it is there.

    Says in one line why there is none.
    """
    wanted = os.environ.get("SVDQ_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"SVDQ_CUDA is 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        print("svdq: built without CUDA, as SVDQ_CUDA=0 asks", flush=True)
        return None
    try:
        return find_toolkit()
    except NoToolkit as reason:
        if wanted == "1":
            raise SystemExit(f"svdq: SVDQ_CUDA=1, but {reason}") from None
        print(f"svdq: built without CUDA: {reason}", flush=True)
        return None


def code_flags() -> list[str]:
    """What nvcc shall generate: SVDQ_CUDA_ARCHS, as CMake writes it (80-virtual is PTX alone)."""
    names = (os.environ.get("SVDQ_CUDA_ARCHS") or ARCHITECTURES).replace(",", ";").split(";")
    codes = []
    for name in names:
        match = re.fullmatch(r"(\d+)(-real|-virtual)?", name.strip())
        if match is None:
            raise SystemExit(f"SVDQ_CUDA_ARCHS: '{name}' is not like 90, 90-real or 80-virtual")
        codes.append(f"compute_{PTX}" if match[2] == "-virtual" else f"sm_{match[1]}")
    return [f"-gencode=arch=compute_{PTX},code=[{','.join(dict.fromkeys(codes))}]"]


def compile_objects(toolkit: Toolkit, folder: Path = OBJECTS) -> list[str]:
    """Compiles csrc/cuda/*.cu, as far as something changed, and returns the objects.

    Beside each lies ptxas's report of its kernels, as ``<name>.log``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(SOURCES.glob("*.cu"))
    flags = " ".join([*NVCC_FLAGS, *code_flags(), f"-I{ROOT}"])
    lines = [
        "rule nvcc",
        f"  command = {toolkit.tool('nvcc')} {flags} -MD -MF $out.d -c $in -o $out > $log 2>&1"
        " || { cat $log; rm -f $out; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
    ]
    objects = []
    for source in sources:
        target = folder / f"{source.stem}.o"
        objects.append(str(target))
        lines += [f"build {target}: nvcc {source}", f"  log = {target.with_suffix('.log')}"]
    ninja = folder / "build.ninja"
    ninja.write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs]
    if subprocess.run(command).returncode != 0:
        raise SystemExit("svdq: compiling csrc/cuda failed")
    return objects


def main() -> None:
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command == "install":
        try:
            requirement = toolkit_requirement()
        except NoToolkit as reason:
            print(f"svdq: no CUDA compiler installed: {reason}")
            return
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, requirement], check=True)
    elif command == "compile":
        toolkit = wanted_toolkit()
        if toolkit is not None:
            compile_objects(toolkit)
    elif command == "path":
        try:
            print(find_toolkit().root)
        except NoToolkit as reason:
            raise SystemExit(str(reason)) from None
    else:
        raise SystemExit("usage: cuda_build.py install | compile | path")


if __name__ == "__main__":
    main()
