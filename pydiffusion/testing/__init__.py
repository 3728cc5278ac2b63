"""Model files made up for tests and benchmarks."""
