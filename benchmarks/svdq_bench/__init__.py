"""Benchmarks of svdq: speed, quality, and the ``svdq`` command."""
