"""What measures svdq: speed, quality, and the ``svdq`` command."""
