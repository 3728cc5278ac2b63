"""The benchmark of a model, and synthetic model files for it and for tests."""
