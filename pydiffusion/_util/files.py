"""Checks of paths given by callers."""

from __future__ import annotations

from pathlib import Path


def check_is_file(path: Path) -> None:
    """Raise IsADirectoryError or FileNotFoundError unless the path is a file."""
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; a model is a GGUF file: make one with 'pydiffusion convert'"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
