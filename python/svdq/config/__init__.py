"""How a cache compresses: settings and named bit schedules."""
