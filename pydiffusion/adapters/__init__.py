"""Adapters (LoRA): PEFT folders and GGUF files, read, checked, written."""
