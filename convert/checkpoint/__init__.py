"""Checkpoints of Hugging Face: files, safetensors, strict JSON."""
