"""Print what the package needs, one requirement a line, from pyproject.toml.

``python build_tools/requirements.py [extra ...]``: the dependencies, then those of the extras. They
can be installed before the extension is compiled, which ``pip install .`` would do first.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """The requirements of the package with these extras, each once."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    found = list(project["dependencies"])
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            print(f"{PYPROJECT.name} has no extra '{extra}'", file=sys.stderr)
        found += project["optional-dependencies"].get(extra, [])
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
