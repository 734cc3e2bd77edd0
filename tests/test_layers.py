"""Rules about the sources as text: who includes whom, how long files are, links that resolve."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# Folder of an including file -> prefixes of the project's own headers that it may include.
OWN_INCLUDES = {
    "kernels": ("kernels/",),
    "csrc/core": ("kernels/", "csrc/core/"),
    "csrc/cpu": ("kernels/", "csrc/core/", "csrc/cpu/"),
    "csrc/gpu": ("kernels/", "csrc/core/", "csrc/gpu/"),
    "csrc/cuda": ("kernels/", "csrc/core/", "csrc/gpu/", "csrc/cuda/"),
    "csrc/emulator": ("kernels/", "csrc/core/", "csrc/gpu/", "csrc/emulator/"),
    "csrc/torch": (
        "kernels/",
        "csrc/core/",
        "csrc/core/gpu_context.h",
        "csrc/cuda/stages.h",
        "csrc/torch/",
    ),
    "tests/core": ("kernels/", "csrc/core/", "csrc/cpu/", "tests/core/"),
    "tests/kernels": ("kernels/", "csrc/", "tests/"),
}
# The same for headers in angle brackets; a folder that is not listed may include any.
# Kernels are compiled by nvcc, so they take nothing that has no meaning on a device.
SYSTEM_INCLUDES = {
    "kernels": r"cstdint|cstddef|cuda_\w+\.h",
    "csrc/core": r"[a-z_]+",
    "csrc/cpu": r"[a-z_]+|immintrin\.h|cpuid\.h",
    "csrc/gpu": r"[a-z_]+",
    "tests/core": r"[a-z_]+|gtest/gtest\.h",
}
CXX_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}


def files_of(folder: str, suffixes: set[str]) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


CXX_FILES = [
    p
    for folder in ("kernels", "csrc", "tests/core", "tests/kernels")
    for p in files_of(folder, CXX_SUFFIXES)
]
PYTHON_FILES = [
    p
    for folder in ("python", "tests", "benchmarks", "tools", "build_tools")
    for p in files_of(folder, {".py"})
]
MARKDOWN_FILES = [*sorted(ROOT.glob("*.md")), *files_of("docs", {".md"})]
BUILD_FILES = [
    ROOT / "CMakeLists.txt",
    ROOT / "Makefile",
    ROOT / "setup.py",
    ROOT / "pyproject.toml",
    ROOT / ".ci/run",
    *sorted(
        p for folder in ("tools", "build_tools") for p in (ROOT / folder).glob("*") if p.is_file()
    ),
]


def code_of(path: Path) -> str:
    """The C++ text without comments and string literals."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: '""' if m[0][0] == '"' else "", path.read_text(), flags=re.S)


@pytest.mark.parametrize("path", CXX_FILES, ids=ids)
def test_includes_follow_the_layers(path):
    folder = next((f for f in OWN_INCLUDES if ids(path).startswith(f + "/")), None)
    assert folder, f"{path.parent} has no include rule: add one to OWN_INCLUDES"
    for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.M):
        if kind == '"':
            assert name.startswith(OWN_INCLUDES[folder]), f"{folder} must not include {name}"
            assert (ROOT / name).is_file(), f"{name} does not exist"
        elif folder in SYSTEM_INCLUDES:
            assert re.fullmatch(SYSTEM_INCLUDES[folder], name), (
                f"{folder} must not include <{name}>"
            )


@pytest.mark.parametrize("path", [*CXX_FILES, *PYTHON_FILES], ids=ids)
def test_files_stay_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines, at most {MAX_LINES}: split it by what it does"


@pytest.mark.parametrize("path", [p for p in CXX_FILES if not ids(p).startswith("tests/")], ids=ids)
def test_library_never_prints_or_aborts(path):
    calls = r"\b(?:printf|fprintf|puts|exit|_exit|abort|terminate|assert|cout|cerr|clog)\b"
    assert not re.findall(calls, code_of(path)), "throw svdq::Error (csrc/core/check.h) instead"


@pytest.mark.parametrize("path", BUILD_FILES, ids=ids)
def test_build_asks_for_no_instruction_set(path):
    # A file's flags also reach the inline functions that it shares with other files, and the linker
    # keeps one copy for all.
    flags = re.findall(r"-m(?:arch|cpu|tune|avx|sse|fma|f16c)\S*", path.read_text())
    assert not flags, f"{flags}: put the code into a target region of csrc/cpu"


def slug(heading: str) -> str:
    """The anchor that a heading gets when the page is rendered."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


@pytest.mark.parametrize("path", MARKDOWN_FILES, ids=ids)
def test_links_resolve(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{target}: no such file"
        if anchor and linked.suffix == ".md":
            slugs = {slug(h) for h in re.findall(r"^#+ (.*)$", linked.read_text(), re.M)}
            assert anchor in slugs, f"{target}: no such heading"
