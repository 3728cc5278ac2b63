"""The sections of ``scripts/behaviour.py``."""
