"""Stand-ins for the outside world, for tests: deterministic, in memory, breakable on purpose."""
