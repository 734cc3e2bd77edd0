"""The ``svdq`` command; each of its commands imports what it needs when it runs."""

from svdq_bench.cli.app import app, main

__all__ = ["app", "main"]
