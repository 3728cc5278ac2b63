"""Synthetic model files for tests and benchmarks."""
