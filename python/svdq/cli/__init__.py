"""The ``svdq`` command; each of its commands imports what it needs when it runs."""

from svdq.cli.app import app, main

__all__ = ["app", "main"]
