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

FACTS = (
    "kernels/format.h",
    "kernels/params.h",
    "kernels/rotation.h",
    "kernels/step_params.h",
)
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
    "kernels/step": (*PAGES, "kernels/pack/", "kernels/attend/", "kernels/step/"),
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
    "csrc/info": ("csrc/core/", "csrc/emulator/backend.h"),
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
        "cpu test": "tests/core/test_pack_keys.cpp",
        "operator test": "tests/ops/test_pack.py",
    },
    # Keys and values are two stages; kernel, launch and operator test hold both.
    ("pack", "pack"): {
        **PREFILL,
        "cpu": "csrc/cpu/pack/pack_keys-inl.h",
        "cpu test": "tests/core/test_pack_keys.cpp",
    },
    ("pack", "pack_values"): {
        **PREFILL,
        "kernel": "kernels/pack/pack.cuh",
        "launch": "csrc/gpu/pack.h",
        "kernel test": "tests/kernels/test_pack.cpp",
    },
    ("pack", "unpack"): {
        "cpu": "csrc/core/unpack.h",  # one plain body for all CPU backends: speed does not matter
        "cpu test": "tests/core/test_pack_keys.cpp",  # packed bytes are read back there
        "benchmark": None,
    },
    # The host program makes a CPU's step of other stages; it is timed as part of attend.
    ("step", "step"): {
        "cpu": None,
        "cpu test": None,
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
    "tests/kernels/test_*.cpp": {"capture", "emulator", "instructions", "launches"},
    "tests/core/test_*.cpp": {"core", "format"},
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
    assert not found, "throw svdq::Error (csrc/core/error.h) instead"


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


# format.h is for host code too, which has no device.cuh, and marks its functions for nvcc.
TELL_COMPILERS_APART = ("kernels/machine/device.cuh", "kernels/format.h", "csrc/emulator/")


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=ids)
def test_compilers_are_told_apart_in_one_file(path):
    if not ids(path).startswith(TELL_COMPILERS_APART):
        found = re.findall(r"__CUDACC__|__CUDA_ARCH__|SVDQ_EMULAT\w*", path.read_text())
        assert not found, f"{found}: only kernels/machine/device.cuh tells nvcc from the emulator"


INLINE_FILES = [p for p in CXX_FILES if p.name.endswith("-inl.h")]


def includes_of(path: Path) -> set[Path]:
    """The project's headers that a file includes, directly or not."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', waiting.pop().read_text(), re.M)
        new = {ROOT / name for name in names} - found
        found |= new
        waiting += sorted(new)
    return found


@pytest.fixture(scope="module")
def defined_in() -> dict[str, Path]:
    """The functions and structs that one -inl.h alone defines at its top level, and that file."""
    places: dict[str, set[Path]] = {}
    for path in INLINE_FILES:
        lines = house.code_of(path).splitlines()
        found = house.cxx_signatures(path)
        names = {s.function for s in found if not lines[s.line - 1].startswith((" ", "}"))}
        names |= set(re.findall(r"^(?:struct|class) (\w+) (?:final )?\{", "\n".join(lines), re.M))
        for name in names:
            places.setdefault(name, set()).add(path)
    return {name: paths.pop() for name, paths in places.items() if len(paths) == 1}


@pytest.mark.parametrize("path", INLINE_FILES, ids=ids)
def test_inline_headers_include_what_they_use(path, defined_in):
    code, included = house.code_of(path), {path, *includes_of(path)}
    for name, place in defined_in.items():
        if place not in included and re.search(rf"(?<![.\w>:]){name}\b\s*[(<{{]", code):
            pytest.fail(f"{ids(path)} uses {name} and does not include {ids(place)}")


@pytest.mark.parametrize("path", [p for p in CXX_FILES if p.name.startswith("target_")], ids=ids)
def test_targets_keep_no_ordered_list(path):
    included = re.findall(r'^\s*#\s*include\s*"(\S+-inl\.h)"', path.read_text(), re.M)
    assert len(included) <= 1, "an -inl.h includes what it uses"


@pytest.mark.parametrize("room, stem", STAGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_one_stem_a_stage(room, stem, layer):
    path = STAGES[room, stem].get(layer, LAYERS[layer].format(room=room, stem=stem))
    if path is not None:
        assert (ROOT / path).is_file(), f"the {layer} of {stem} is {path}: see STAGES"


@pytest.mark.parametrize("room, stem", STAGES)
def test_every_stage_is_instantiated(room, stem):
    texts = (p.read_text() for p in (ROOT / "csrc/cuda").glob("*.cu"))
    launch = STAGES[room, stem].get("launch", LAYERS["launch"].format(stem=stem))
    included = f'#include "{launch}"'
    launchers = [p for p in (ROOT / "csrc/gpu").glob("*.h") if included in p.read_text()]
    wanted = [included, *(f'#include "csrc/gpu/{p.name}"' for p in launchers)]
    assert any(line in text for text in texts for line in wanted), f"no csrc/cuda/*.cu has {launch}"


def test_no_import_circles():
    graph = house.import_graph()
    assert house.circles(graph) == []
    assert house.circles(house.room_graph(graph)) == []


def test_files_stay_short():
    assert house.long_files() == {}, "split them by what they do"


def test_parameters_are_few():
    assert [str(s) for s in house.long_signatures()] == []


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
