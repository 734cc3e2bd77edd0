"""The ``svdq`` command: starts :mod:`svdq_bench.cli`, whose packages are an extra."""

from __future__ import annotations

import importlib.util
import sys

PACKAGES = ("typer", "rich", "matplotlib")
EXIT_CODE = 2


def main() -> None:
    """Entry point of the ``svdq`` script."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"svdq: error: the command needs {', '.join(missing)}: pip install 'svdq[bench]'",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_CODE)
    from svdq_bench.cli import main as run

    run()
