"""GGUF files: header, splits, reading, writing, resuming."""
