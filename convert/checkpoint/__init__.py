"""Hugging Face checkpoints: hub, safetensors, strict JSON."""
