"""Rules about the sources as text: includes, stems, sizes, circles, links that resolve."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("house", ROOT / "tools/house.py")
house = sys.modules["house"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)

FACTS = ("kernels/format.h", "kernels/params.h")
PAGES = (*FACTS, "kernels/machine/", "kernels/pages/")
# File or folder of an including file -> prefixes of the project's own headers that it may include.
# The longest entry counts.
OWN_INCLUDES = {
    "kernels": FACTS,
    "kernels/machine": (*FACTS, "kernels/machine/"),
    "kernels/pages": PAGES,
    "kernels/pack": (*PAGES, "kernels/pack/"),
    "kernels/fit": (*PAGES, "kernels/pack/", "kernels/fit/"),
    "kernels/attend": (*PAGES, "kernels/attend/"),
    "kernels/select": (*PAGES, "kernels/attend/", "kernels/select/"),
    "csrc/core": ("kernels/", "csrc/core/"),
    "csrc/cpu": ("kernels/", "csrc/core/", "csrc/cpu/"),
    "csrc/gpu": ("kernels/", "csrc/core/", "csrc/gpu/"),
    "csrc/cuda": ("kernels/", "csrc/core/", "csrc/gpu/", "csrc/cuda/"),
    "csrc/emulator": ("kernels/", "csrc/core/", "csrc/gpu/", "csrc/emulator/"),
    "csrc/torch": (
        "kernels/",
        "csrc/core/",
        "csrc/cuda/backend.h",
        "csrc/emulator/backend.h",
        "csrc/torch/",
    ),
    "tests/core": ("kernels/", "csrc/core/", "csrc/cpu/", "tests/core/"),
    "tests/kernels": ("kernels/", "csrc/", "tests/"),
    "tools": ("kernels/", "csrc/", "tests/"),
}
# The same for headers in angle brackets; a folder that is not listed may include any. Kernels are
# compiled by nvcc, so they take nothing that has no meaning on a device.
SYSTEM_INCLUDES = {
    "kernels": r"cstdint|cstddef|cuda_\w+\.h",
    "csrc/core": r"[a-z_]+",
    "csrc/cpu": r"[a-z_]+|immintrin\.h|cpuid\.h",
    "csrc/gpu": r"[a-z_]+",
    "tests/core": r"[a-z_]+|gtest/gtest\.h",
}

# One stem a stage in every layer. Its file in a layer is LAYERS with its room and stem, or
# the one in STAGES, for the reason next to it; None: it has none there.
LAYERS = {
    "kernel": "kernels/{room}/{stem}.cuh",
    "launch": "csrc/gpu/{stem}.h",
    "cpu": "csrc/cpu/{room}/{stem}-inl.h",
    "kernel test": "tests/kernels/test_{stem}.cpp",
    "cpu test": "tests/core/test_{stem}.cpp",
    "operator test": "tests/ops/test_{stem}.py",
    "benchmark": "benchmarks/svdq_bench/speed/{stem}.py",
}
FIT_BENCHMARK = {"benchmark": "benchmarks/svdq_bench/speed/fit.py"}  # a basis is fitted in one go
PREFILL = {"benchmark": "benchmarks/svdq_bench/speed/prefill.py"}  # packing is timed with a prompt
SPARSE = {"benchmark": "benchmarks/svdq_bench/speed/sparse.py"}  # timed as one sparse step
STAGES = {
    ("fit", "finite"): {
        **FIT_BENCHMARK,
        "operator test": "tests/ops/test_bad_input.py",  # it refuses input
    },
    ("fit", "covariance"): FIT_BENCHMARK,
    ("fit", "quantizer"): FIT_BENCHMARK,
    # Pack and fit project, and no operator does it alone.
    ("pack", "project"): {
        **PREFILL,
        "kernel test": "tests/kernels/test_pack.cpp",
        "cpu test": "tests/core/test_pack.cpp",
        "operator test": "tests/ops/test_pack.py",
    },
    ("pack", "pack"): PREFILL,
    ("pack", "unpack"): {
        "cpu": "csrc/core/unpack.h",  # one plain body for all CPU backends: speed does not matter
        "cpu test": "tests/core/test_pack.cpp",  # packed bytes are read back there
        "benchmark": None,
    },
    # Stages of several kernels, which plan.cuh lists.
    ("select", "select"): {**SPARSE, "kernel": "kernels/select/plan.cuh"},
    ("attend", "attend"): {"kernel": "kernels/attend/plan.cuh"},
    ("select", "gather"): SPARSE,
    # Merging is a step of attending, and an operator of its own.
    ("attend", "merge"): {
        "launch": "csrc/gpu/attend.h",
        "kernel test": "tests/kernels/test_attend.cpp",
        "cpu test": "tests/core/test_attend.cpp",
        "benchmark": "benchmarks/svdq_bench/speed/attend.py",
    },
}
# Tests of what is no stage.
OTHER_TESTS = {
    "tests/kernels/test_*.cpp": {"capture", "instructions", "emulator"},
    "tests/core/test_*.cpp": {"core", "format", "basis"},
}

CXX_FILES = house.CXX_FILES
LIBRARY_FILES = [p for p in CXX_FILES if house.relative(p).startswith(("kernels/", "csrc/"))]
DEVICE_FILES = [
    p
    for p in CXX_FILES
    if house.relative(p).startswith(("kernels/", "csrc/gpu/", "csrc/cuda/"))
    and not house.relative(p).startswith("kernels/machine/")
]
MARKDOWN_FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BUILD_FILES = [
    *(ROOT / name for name in ("CMakeLists.txt", "Makefile", "setup.py", "pyproject.toml")),
    ROOT / ".ci/run",
    *sorted(p for folder in ("tools", "build_tools") for p in (ROOT / folder).glob("*.*")),
]


def ids(path: Path) -> str:
    return house.relative(path)


def entry(table: dict, path: Path):
    """The value of the longest key that is the file or one of its folders."""
    places = [house.relative(path), *map(str, path.relative_to(ROOT).parents)]
    return next((table[place] for place in places if place in table), None)


@pytest.mark.parametrize("path", CXX_FILES, ids=ids)
def test_includes_follow_the_layers(path):
    own, system = entry(OWN_INCLUDES, path), entry(SYSTEM_INCLUDES, path)
    assert own, f"{path.parent} has no include rule: add one to OWN_INCLUDES"
    for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.M):
        if kind == '"':
            assert name.startswith(own), f"{ids(path)} must not include {name}"
            assert (ROOT / name).is_file(), f"{name} does not exist"
        elif system:
            assert re.fullmatch(system, name), f"{ids(path)} must not include <{name}>"


@pytest.mark.parametrize("path", DEVICE_FILES, ids=ids)
def test_instructions_are_in_machine(path):
    assert not re.search(r"\basm\b", house.code_of(path)), "asm belongs into kernels/machine"


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=ids)
def test_library_never_prints_or_aborts(path):
    calls = r"\b(?:printf|fprintf|puts|exit|_exit|abort|terminate|assert|cout|cerr|clog)\b"
    found = re.findall(calls, house.code_of(path))
    assert not found, "throw svdq::Error (csrc/core/check.h) instead"


@pytest.mark.parametrize("path", BUILD_FILES, ids=ids)
def test_build_asks_for_no_instruction_set(path):
    # A file's flags also reach the inline functions that it shares with other files, and the linker
    # keeps one copy for all.
    flags = re.findall(r"-m(?:arch|cpu|tune|avx|sse|fma|f16c)\S*", path.read_text())
    assert not flags, f"{flags}: put the code into a target region of csrc/cpu"


@pytest.mark.parametrize(
    "code, parameters",
    [
        ("void f(const A<B, C>& a, int (*g)(int, int), T x[3] = {1, 2});", 3),
        ("template <int N> SVDQ_DEVICE auto f(float* __restrict__ a, int b) -> int {", 2),
        ("auto step = [&](int64_t token, const float (&row)[4]) {", 2),
        ("Plan(int a, int b) : a_(a) {}", 2),
        ("f(a, b, c);", None),
        ("if (first < last && ready(a, b)) {", None),
        ("// void f(int a);", None),
    ],
)
def test_parameters_of_cpp_are_counted(code, parameters, tmp_path, monkeypatch):
    monkeypatch.setattr(house, "ROOT", tmp_path)
    path = tmp_path / "a.cpp"
    path.write_text(code)
    found = [s.parameters for s in house.cxx_signatures(path)]
    assert found[:1] == ([parameters] if parameters else [])


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set(), "e": {"e", "d"}}
    assert house.circles(graph) == [["b", "c"], ["e"]]


def test_rooms_are_few_and_the_library_small():
    assert len(house.rooms()) <= house.MAX_ROOMS
    assert house.library_lines() <= house.MAX_LIBRARY_LINES


@pytest.mark.parametrize("pattern", OTHER_TESTS)
def test_tests_are_named_after_stages(pattern):
    known = {stem for _, stem in STAGES} | OTHER_TESTS[pattern]
    for path in ROOT.glob(pattern):
        name = path.stem.removeprefix("test_")
        assert any(name == stem or name.startswith(stem + "_") for stem in known), ids(path)


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
