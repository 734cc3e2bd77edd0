"""Builds the extension ``svdq._C``; all else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
SOURCE_FOLDERS = ("csrc/core", "csrc/cpu", "csrc/torch")
HEADER_FOLDERS = ("kernels", *SOURCE_FOLDERS)


def find_files(folders: tuple[str, ...], pattern: str) -> list[str]:
    """Files of these folders that match, relative to the repository root."""
    return sorted(str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).glob(pattern))


# The flags hold for every source, so none of them asks for an instruction set: what needs one lies
# in target regions of csrc/cpu and is chosen at run time. -fopenmp makes at::parallel_for parallel;
# it is no link flag, because libtorch brings its OpenMP runtime along and a second one would mean a
# second pool of threads.
extension = CppExtension(
    "svdq._C",
    sources=find_files(SOURCE_FOLDERS, "*.cpp"),
    depends=find_files(HEADER_FOLDERS, "*.h"),
    include_dirs=[str(ROOT)],
    extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp"],
)


class BuildInOneFolder(BuildExtension):
    """Keeps its objects in one folder, whoever calls it, so that every build is incremental."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build/extension")


setup(ext_modules=[extension], cmdclass={"build_ext": BuildInOneFolder})
