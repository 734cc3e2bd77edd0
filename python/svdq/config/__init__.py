"""Settings of a cache and named bit schedules."""
