"""Texts of different domains that every CPython installation has or that come with the command,
and the user's own."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

DEFAULT_TEXT = "topics"
# Shorter docstrings are signatures and remarks rather than prose.
DOCSTRING_CHARACTERS = 400
CODE_CHARACTERS = 1_000_000
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}


def topics() -> str:
    """CPython's reference text, ``pydoc_data.topics``: half a megabyte of English prose and code.

    The values of ``topics`` in the order of their keys, joined by blank lines.
    """
    from pydoc_data.topics import topics as found

    return "\n\n".join(found[key] for key in sorted(found))


def docstrings() -> str:
    """Long docstrings of the standard library, in the order of its files: prose about modules."""
    found = (text for path in _modules("**/*.py") for text in _docstrings(path))
    return "\n\n".join(text for text in found if len(text) >= DOCSTRING_CHARACTERS)


def code() -> str:
    """Source of the standard library's modules in alphabetical order, the first megabyte."""
    parts, length = [], 0
    for path in _modules("*.py"):
        parts.append(path.read_text(encoding="utf-8"))
        length += len(parts[-1])
        if length >= CODE_CHARACTERS:
            break
    return "\n\n".join(parts)[:CODE_CHARACTERS]


def fiction() -> str:
    """A Scandal in Bohemia, nearly all of it, Arthur Conan Doyle, 1891.

    In the public domain.
    """
    return _corpus("fiction")


def history() -> str:
    """The first chapters of History of the United States, Charles and Mary Beard, 1921.

    In the public domain.
    """
    return _corpus("history")


# Names that stand for a text where a file's path may.
TEXTS: dict[str, Callable[[], str]] = {
    "topics": topics,
    "docstrings": docstrings,
    "code": code,
    "fiction": fiction,
    "history": history,
}
# What bases are calibrated on unless a user names other texts.
MIXTURE = tuple(TEXTS)


def load_text(source: str | Path | None = None) -> str:
    """One of ``TEXTS`` by its name, or a UTF-8 file; the default text without a source.

    Raises
    ------
    FileNotFoundError
        For a file that cannot be read, or a Python without the files of its library.
    ValueError
        For a file that is no UTF-8 text.
    """
    name = DEFAULT_TEXT if source is None else str(source)
    if name in TEXTS:
        text = TEXTS[name]()
        if not text:
            raise FileNotFoundError(f"this Python has no files to take the text {name!r} from")
        return text
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise FileNotFoundError(
            f"cannot read {name}: {error.strerror}; names of texts are {', '.join(TEXTS)}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is no UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def name_of(source: str | Path | None) -> str:
    """Name of a text in rows of results."""
    return DEFAULT_TEXT if source is None else Path(source).name


def _corpus(name: str) -> str:
    path = resources.files("svdq_bench.quality") / "corpora" / f"{name}.txt"
    return path.read_text(encoding="utf-8")


def _modules(pattern: str) -> Iterator[Path]:
    """Files of the standard library, without its tests and what differs from system to system."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob(pattern)):
        parts = path.relative_to(library).parts
        if not NOT_LIBRARY & set(parts) and not path.name.startswith("_sysconfigdata"):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions; none where it is no UTF-8 or no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates that only look like modules
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
