"""The demo model as a GGUF, for tests that need answers that are right."""

from __future__ import annotations

from pathlib import Path


def write_demo_model(folder: Path, type: str = "q8_0") -> Path:
    """Convert the demo checkpoint into a folder; returns the file."""
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    target = folder / "demo.gguf"
    convert(checkpoint_path(), target, type)
    return target
