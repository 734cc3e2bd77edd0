"""Print the layout in numbers: import circles, rooms, lines and parameters, each with its limit.

``python tools/house.py`` exits with 1 if a limit is exceeded; tests/test_layers.py holds the same
limits.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"svdq": ROOT / "python/svdq", "svdq_bench": ROOT / "benchmarks/svdq_bench"}
LIBRARY = PACKAGES["svdq"]

MAX_ROOMS = 10
MAX_LIBRARY_LINES = 10100
MAX_FILE_LINES = 350
MAX_PARAMETERS = 8

# Files that may be longer, and the reason.
LONG_FILES: dict[str, str] = {}
# The one exception to MAX_PARAMETERS: functions that csrc/torch binds to operators mirror the flat
# schemas. They are found by this registration.
BOUND = r"\.impl\(\s*\"\w*\"\s*,\s*(?:TORCH_FN\()?&?(\w+)"

CXX_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
CXX_FOLDERS = ("kernels", "csrc", "tests/core", "tests/kernels", "tools")
PYTHON_FOLDERS = ("python", "benchmarks", "tests", "tools", "build_tools")


def files_of(folders: tuple[str, ...], suffixes: set[str]) -> list[Path]:
    """The files below these folders of the repository with these suffixes."""
    return sorted(p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes)


CXX_FILES = files_of(CXX_FOLDERS, CXX_SUFFIXES)
PYTHON_FILES = [ROOT / "setup.py", *files_of(PYTHON_FOLDERS, {".py"})]


def relative(path: Path) -> str:
    """The path from the repository root."""
    return str(path.relative_to(ROOT))


# --- imports ---


def module_name(path: Path) -> str:
    """The dotted name of a file of a package."""
    for package, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise ValueError(f"{path} is in no package")


EXTENSION = "svdq._C"  # a module without a source in Python


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, inside functions and under TYPE_CHECKING too.

    ``from package import name`` counts as the module ``package.name`` if there is one, else as the
    package.
    """
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return (found & modules) - {name}


def import_graph() -> dict[str, set[str]]:
    """For each module of the packages, the modules that it imports."""
    modules = {
        module_name(p): p for folder in PACKAGES.values() for p in sorted(folder.rglob("*.py"))
    }
    known = {*modules, EXTENSION}
    return {name: imported_modules(path, known) for name, path in modules.items()}


def room_of(module: str) -> str:
    """The room of a module: the folder or file directly under its package, else the package."""
    return ".".join(module.split(".")[:2])


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """For each room, the other rooms that its modules import."""
    rooms: dict[str, set[str]] = {}
    for module, imports in graph.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update({room_of(m) for m in imports} - {room})
    return rooms


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of two nodes or more that reach each other (strongly connected components)."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    reach = {node: reachable(node) for node in graph}
    groups = {
        tuple(sorted({other for other in reach[node] if node in reach.get(other, ())}))
        for node in graph
        if node in reach[node]
    }
    return sorted(list(group) for group in groups)


# --- sizes ---


def rooms() -> list[str]:
    """The folders and files directly under python/svdq, without the package's own ``__init__``."""
    return sorted(
        p.name
        for p in LIBRARY.iterdir()
        if (p.suffix == ".py" and p.name != "__init__.py") or (p / "__init__.py").exists()
    )


def count_lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


def library_lines() -> int:
    """Lines of Python under python/svdq."""
    return sum(count_lines(p) for p in LIBRARY.rglob("*.py"))


# --- parameters ---


@dataclass(frozen=True, order=True)
class Signature:
    """A function and the number of its positional parameters."""

    parameters: int
    function: str
    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.function} takes {self.parameters}"


def python_signatures(path: Path) -> Iterator[Signature]:
    """The functions of a Python file; self and cls are not counted."""
    tree = ast.parse(path.read_text())
    methods = {
        item
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in item.decorator_list)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            positional = len(node.args.posonlyargs) + len(node.args.args) - (node in methods)
            yield Signature(positional, node.name, relative(path), node.lineno)


def code_of(path: Path) -> str:
    """The text of a C++ file without comments, literals and directives, its lines kept."""

    def blank(match: re.Match) -> str:
        literal = match[0][0] in "\"'"
        return ('""' if literal else " ") + "\n" * match[0].count("\n")

    pattern = (
        r'R"([^(\s]*)\(.*?\)\1"|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
        r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'"
    )
    text = re.sub(pattern, blank, path.read_text(), flags=re.S)
    directive = r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*"
    return re.sub(directive, lambda m: "\n" * m[0].count("\n"), text, flags=re.M)


# Words before a parenthesis that are no function's name.
NOT_FUNCTIONS = re.compile(
    "if|for|while|switch|return|sizeof|alignof|decltype|static_assert|catch|noexcept|alignas"
    "|__attribute__|defined|throw|new|delete|operator|requires"
)


def split_parameters(text: str) -> list[str]:
    """A parameter list at its commas, those inside brackets of every kind left alone."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "([{" or (c == "<" and re.search(r"[\w>]\s*$", text[:i])):
            depth += 1
        elif c in ")]}" or (c == ">" and depth and text[i - 1] != "-"):
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip() not in ("", "void")]


def looks_declared(parameter: str) -> bool:
    """True for ``type name`` or ``type``, false for most expressions."""
    declared = parameter.split("=")[0]
    return bool(
        re.fullmatch(
            r"(?:const\s+|struct\s+|typename\s+)*[A-Za-z_][\w:]*(?:\s*<.*>(?:::\w+)*)?"
            r"(?:\s+const)?[\s*&.]*(?:const\s*)?(?:\(\s*[*&]\s*\w*\s*\)\s*(?:\(.*\)|\[\w*\]))?"
            r"(?:__restrict__\s*)?(?:\w+)?\s*(?:\[[^\]]*\])*",
            declared.strip(),
            re.S,
        )
    )


def cxx_signatures(path: Path) -> Iterator[Signature]:
    """The functions that a C++ file defines or declares, lambdas as well.

    A parenthesis behind a name (or behind the brackets of a lambda) is a parameter list if every
    part looks like ``type name`` and a body, a semicolon or a qualifier follows.
    """
    code = code_of(path)
    for match in re.finditer(r"(\b[A-Za-z_]\w*|\])\s*\(", code):
        name, opening = match[1], match.end() - 1
        if NOT_FUNCTIONS.fullmatch(name):
            continue
        depth, end = 0, opening
        for end in range(opening, len(code)):
            depth += (code[end] == "(") - (code[end] == ")")
            if depth == 0:
                break
        after = code[end + 1 : end + 80].lstrip()
        if not re.match(r"\{|;|:(?!:)|->|=|(?:const|noexcept|override|mutable|requires)\b", after):
            continue
        parameters = split_parameters(code[opening + 1 : end])
        typed = [p for p in parameters if re.search(r"[\w>&*]\s+[*&]*\w|[*&>]\s*\w", p)]
        if len(typed) < len(parameters) or not all(map(looks_declared, parameters)):
            continue
        line = code.count("\n", 0, opening) + 1
        yield Signature(len(parameters), "lambda" if name == "]" else name, relative(path), line)


def bound_functions() -> set[str]:
    """The C++ functions that are bound to operators, and so mirror their schemas."""
    texts = (path.read_text() for path in (ROOT / "csrc/torch").glob("ops_*.cpp"))
    return {name for text in texts for name in re.findall(BOUND, text)}


def long_signatures() -> list[Signature]:
    """The functions that take more than MAX_PARAMETERS, those bound to operators left out."""
    found = [s for path in PYTHON_FILES for s in python_signatures(path)]
    bound = bound_functions()
    for path in CXX_FILES:
        exempt = bound if relative(path).startswith("csrc/torch/ops_") else set()
        found += [s for s in cxx_signatures(path) if s.function not in exempt]
    return sorted((s for s in found if s.parameters > MAX_PARAMETERS), reverse=True)


def long_files() -> dict[str, int]:
    """Files of code with more than MAX_FILE_LINES lines, those of LONG_FILES left out."""
    lengths = {relative(p): count_lines(p) for p in [*CXX_FILES, *PYTHON_FILES]}
    return {
        name: lines
        for name, lines in lengths.items()
        if lines > MAX_FILE_LINES and name not in LONG_FILES
    }


def main() -> int:
    """Print the numbers, then the places that exceed them."""
    graph = import_graph()
    module_circles, room_circles = circles(graph), circles(room_graph(graph))
    exceeded = []

    def show(name: str, number: int, limit: int, places: list[str]) -> None:
        mark = "" if number <= limit else "   exceeded"
        print(f"{name:42}{number:7,}   at most {limit:,}{mark}")
        if mark:
            exceeded.extend(f"{name}: {place}" for place in places)

    show("import circles of modules", len(module_circles), 0, [" ".join(c) for c in module_circles])
    show("import circles of rooms", len(room_circles), 0, [" ".join(c) for c in room_circles])
    show("rooms of python/svdq", len(rooms()), MAX_ROOMS, [" ".join(rooms())])
    lines = library_lines()
    show("lines of python/svdq", lines, MAX_LIBRARY_LINES, [f"{lines:,}"])
    long = [f"{name} has {lines} lines" for name, lines in sorted(long_files().items())]
    show(f"files of more than {MAX_FILE_LINES} lines", len(long), 0, long)
    signatures = long_signatures()
    most = max((s.parameters for s in signatures), default=MAX_PARAMETERS)
    show("positional parameters of a function", most, MAX_PARAMETERS, list(map(str, signatures)))
    print(f"(except {', '.join(sorted(bound_functions()))}: bound to operators in csrc/torch)")
    for name, reason in LONG_FILES.items():
        print(f"{name} may be longer: {reason}")
    print("\n".join(exceeded))
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
