"""Builds the extension ``svdq._C``; everything else about the package is in pyproject.toml.

CMake builds all that does not need torch (CMakeLists.txt, in build/cpp, where the C++ tests are
built too); here the operators of csrc/torch are compiled and linked with it.

- SVDQ_CUDA, SVDQ_CUDA_ARCHS: CUDA kernels (build_tools/cuda_toolkit.py has the defaults).
- SVDQ_EMULATION: the backend "emulated", which runs the CUDA kernels on the CPU; 0 leaves it out, 1
  insists, unset it is there where Boost.Context is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))
import cuda_toolkit  # noqa: E402

OBJECTS = ROOT / "build/extension"
LIBRARIES = ROOT / "build/cpp"
SOURCES = ["csrc/torch/*.cpp"]


def find_files(*patterns: str) -> list[str]:
    """Files that match, relative to the repository root."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def wants_emulation() -> bool:
    """True if the emulated backend is built; says in one line where it cannot be."""
    wanted = os.environ.get("SVDQ_EMULATION", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"SVDQ_EMULATION is 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return False
    probe = [os.environ.get("CXX", "g++"), "-x", "c++", "-std=c++20", "-fsyntax-only", "-"]
    source = "#include <boost/context/fiber.hpp>\n"
    if subprocess.run(probe, input=source, text=True, capture_output=True).returncode == 0:
        return True
    missing = "boost/context/fiber.hpp is missing (Debian: libboost-context-dev)"
    if wanted == "1":
        raise SystemExit(f"svdq: SVDQ_EMULATION=1, but {missing}")
    print(f"svdq: built without the emulated backend: {missing}", flush=True)
    return False


# The flags hold for every source, so none of them asks for an instruction set: code that needs one
# is in target regions of csrc/cpu and is chosen at run time. -fopenmp makes at::parallel_for
# parallel; it is no link flag, because libtorch brings its OpenMP runtime along and a second one
# would mean a second pool of threads.
EXTENSION = CppExtension(
    "svdq._C",
    sources=find_files(*SOURCES),
    depends=find_files("kernels/**/*.h", "csrc/core/*.h", "csrc/gpu/*.h", "csrc/torch/*.h"),
    include_dirs=[str(ROOT)],
    extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp"],
)


# The command `svdq info` answers without torch, so the module that it asks links none.
INFO = Extension(
    "svdq_bench._info",
    sources=["csrc/info/module.cpp"],
    depends=find_files("csrc/core/*.h"),
    include_dirs=[str(ROOT), *include_paths()],
    extra_compile_args=["-std=c++20", "-O2", "-g0", "-fvisibility=hidden"],
    language="c++",
)


class Build(BuildExtension):
    """Keeps its objects in one folder, whoever calls it, so that every build is incremental."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(OBJECTS)

    def build_extensions(self) -> None:
        ext, info = self.extensions
        targets = ["svdq_core", "svdq_cpu"]
        if wants_emulation():
            targets.append("svdq_emulator")
            ext.define_macros.append(("SVDQ_WITH_EMULATION", None))
            ext.extra_link_args.append("-lboost_context")
        found = cuda_toolkit.find_compiler()
        if found is not None:
            targets.append("svdq_cuda")
        self.build_libraries(targets, found)
        if found is not None:
            self.add_cuda(ext, json.loads((LIBRARIES / "cuda.json").read_text()))
        archives = [str(LIBRARIES / f"lib{target}.a") for target in targets]
        # Core and backends need each other; the libraries that they need follow them.
        group = ["-Wl,--start-group", *archives, "-Wl,--end-group"]
        ext.extra_link_args = [*group, *ext.extra_link_args]
        # Options decide about building anew, as the times of sources and libraries do.
        choices = OBJECTS / "choices"
        text = f"{ext.sources} {ext.define_macros} {ext.extra_link_args}"
        if not choices.exists() or choices.read_text() != text:
            OBJECTS.mkdir(parents=True, exist_ok=True)
            choices.write_text(text)
        for built in (ext, info):
            built.depends += [str(choices), *archives]
        # The same rows of the CPU, and what the build has for CUDA.
        info.define_macros = ext.define_macros
        info.extra_link_args = [a for a in [*group, "-lboost_context"] if a in ext.extra_link_args]
        super().build_extensions()

    def build_libraries(self, targets: list[str], cuda: tuple[Path, str] | None) -> None:
        """Build these CMake targets, with this compiler of CUDA and for these architectures."""
        options = [f"-DSVDQ_CUDA={'ON' if cuda else 'OFF'}"]
        if "svdq_emulator" in targets:
            options.append("-DSVDQ_EMULATION=ON")
        if cuda:
            options += [f"-DCMAKE_CUDA_COMPILER={cuda[0]}", f"-DSVDQ_CUDA_ARCHS={cuda[1]}"]
            packages = cuda_toolkit.package_folder()
            if packages is not None:
                options.append(f"-DSVDQ_CUDA_PACKAGES={packages}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        configure = ["cmake", "-S", str(ROOT), "-B", str(LIBRARIES), *options]
        build = ["cmake", "--build", str(LIBRARIES), "--parallel", jobs, "--target", *targets]
        for command in (configure, build):
            if subprocess.run(command, check=False).returncode != 0:
                raise SystemExit(f"svdq: failed: {' '.join(command)}")

    def add_cuda(self, ext: CppExtension, cuda: dict[str, list[str]]) -> None:
        """Link the CUDA libraries that cuda.cmake chose."""
        ext.define_macros.append(("SVDQ_WITH_CUDA", None))
        ext.include_dirs += cuda["includes"]
        ext.libraries += ["c10_cuda", "torch_cuda"]
        folders = sorted({os.path.dirname(path) for path in cuda["libraries"]})
        # The libraries are torch's own packages: a wheel finds them next to the package, and this
        # build in its own environment.
        rpaths = [f"$ORIGIN/../nvidia/{Path(folder).parent.name}/lib" for folder in folders]
        rpaths += [f"$ORIGIN/{os.path.relpath(f, ROOT / 'python/svdq')}" for f in folders]
        ext.extra_link_args += [*cuda["libraries"], f"-Wl,-rpath,{':'.join(rpaths)}"]


setup(ext_modules=[EXTENSION, INFO], cmdclass={"build_ext": Build})
