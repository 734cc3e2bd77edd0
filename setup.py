"""Builds the extension ``svdq._C``; all else about the package stands in pyproject.toml.

CUDA kernels are compiled when the toolkit is there (build_tools/cuda_build.py; SVDQ_CUDA=0 leaves
them out, SVDQ_CUDA=1 insists), their emulation when Boost.Context is.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))
import cuda_build  # noqa: E402

BUILD = ROOT / "build/extension"
SOURCE_FOLDERS = ["csrc/core", "csrc/cpu", "csrc/torch"]
EMULATION_FOLDERS = ["csrc/emulator"]


def find_files(folders: list[str], *patterns: str) -> list[str]:
    """Files of these folders that match, relative to the repository root."""
    paths = [p for f in folders for pattern in patterns for p in (ROOT / f).rglob(pattern)]
    return sorted(str(p.relative_to(ROOT)) for p in paths)


def has_boost_context() -> bool:
    probe = [os.environ.get("CXX", "g++"), "-x", "c++", "-std=c++20", "-fsyntax-only", "-"]
    source = "#include <boost/context/fiber.hpp>\n"
    return subprocess.run(probe, input=source, text=True, capture_output=True).returncode == 0


# The flags hold for every source, so none of them asks for an instruction set: what needs one lies
# in target regions of csrc/cpu and is chosen at run time. -fopenmp makes at::parallel_for parallel;
# it is no link flag, because libtorch brings its OpenMP runtime along and a second one would mean a
# second pool of threads.
def extension() -> CppExtension:
    folders, macros, libraries = list(SOURCE_FOLDERS), [], []
    if has_boost_context():
        folders += EMULATION_FOLDERS
        macros.append(("SVDQ_WITH_EMULATION", None))
        libraries.append("boost_context")
    else:
        print("svdq: built without the emulated backend: boost/context/fiber.hpp is missing")
    return CppExtension(
        "svdq._C",
        sources=find_files(folders, "*.cpp"),
        depends=find_files(["kernels", "csrc/gpu", *folders], "*.h", "*.cuh"),
        include_dirs=[str(ROOT)],
        define_macros=macros,
        libraries=libraries,
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp"],
    )


class Build(BuildExtension):
    """Keeps its objects in one folder, whoever calls it, so that every build is incremental."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(BUILD)

    def build_extensions(self) -> None:
        (ext,) = self.extensions
        toolkit = cuda_build.wanted_toolkit()
        if toolkit is not None:
            self.add_cuda(ext, toolkit)
        # What is linked and defined decides about building anew, as the sources' times do.
        choices = BUILD / "choices"
        text = f"{ext.sources} {ext.define_macros} {ext.extra_objects} {ext.extra_link_args}"
        if not choices.exists() or choices.read_text() != text:
            BUILD.mkdir(parents=True, exist_ok=True)
            choices.write_text(text)
        ext.depends += [str(choices), *ext.extra_objects]
        super().build_extensions()

    def add_cuda(self, ext: CppExtension, toolkit: cuda_build.Toolkit) -> None:
        ext.extra_objects += cuda_build.compile_objects(toolkit)
        ext.sources += find_files(["csrc/cuda"], "*.cpp")
        ext.depends += find_files(["csrc/cuda"], "*.h")
        ext.define_macros.append(("SVDQ_WITH_CUDA", None))
        ext.include_dirs.append(str(toolkit.include))
        # Files of torch's own packages: where a wheel finds them, and where this build does.
        here = os.path.relpath(toolkit.lib, ROOT / "python/svdq")
        names = ["cudart", "cublas", "cusolver"]
        ext.extra_link_args += [
            f"-L{toolkit.lib}",
            *(f"-l:{toolkit.library(name)}" for name in names),
            f"-Wl,-rpath,$ORIGIN/../nvidia/{toolkit.root.name}/lib:$ORIGIN/{here}",
        ]
        ext.libraries += ["c10_cuda", "torch_cuda"]


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
