"""The demo model that ships with the package: a small DiffusionGemma for 6x6 sudokus and a few text tasks."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

__all__ = ["checkpoint_path", "puzzles"]


def checkpoint_path() -> Path:
    """The folder of the demo model's checkpoint, in the form of Hugging Face.

    Raises FileNotFoundError when the package was installed without it.
    """
    with as_file(files(__name__) / "checkpoint") as folder:
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"the demo checkpoint is missing from {folder}: reinstall pydiffusion, or make it again with "
                "examples/train_demo.py"
            )
        return folder


def puzzles() -> list[tuple[str, str]]:
    """The held-out puzzles with their solutions, both 36 characters row by row, `.` for an empty cell.

    None of their solutions, even up to relabelling, was seen in training; every puzzle has exactly one.
    """
    text = (files(__name__) / "held_out.txt").read_text(encoding="ascii")
    pairs = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return [(puzzle, solution) for puzzle, solution in pairs]
