"""``pydiffusion demo --image``: draw a held-out sudoku, and read it from the picture."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ._text import say

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel

_QUESTION = "sudoku"


def draw_puzzle(puzzle: str, picture: Path | None, seed: int) -> Path:
    """Draw the puzzle to a PNG, at `picture` or in a new temporary file; returns its path."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise typer.BadParameter("--image needs Pillow: pip install pillow") from None
    from pydiffusion.demo import pictures

    rng = random.Random(seed)
    image = pictures.draw(puzzle, pictures.Look.random(rng), rng)
    if picture is None:
        with tempfile.NamedTemporaryFile(prefix="sudoku-", suffix=".png", delete=False) as file:
            picture = Path(file.name)
    try:
        image.save(picture, "PNG")
    except OSError as error:
        raise typer.BadParameter(
            f"--picture {picture}: can't be written: {error.strerror or error}"
        ) from None
    say(f"drew the puzzle to {picture}")
    return picture


def read_picture(model: DiffusionModel, picture: Path, puzzle: str) -> list[dict[str, str]]:
    """Read a drawn puzzle; prints the cells as read, and returns a message's content with the picture."""
    from pydiffusion.demo import checkpoint_path, reading, sudoku

    features = model.encode_image(picture)
    read = reading.read_cells(features, reading.character_embeddings(checkpoint_path()))
    print(f"{sudoku.as_rows(read)}\n\n{_mistakes(puzzle, read)}\n", flush=True)
    return [{"type": "text", "text": _QUESTION}, {"type": "image", "path": str(picture)}]


def _mistakes(puzzle: str, read: str) -> str:
    wrong = [
        f"row {cell // 6 + 1}, column {cell % 6 + 1}: {_name(found)} for {_name(drawn)}"
        for cell, (drawn, found) in enumerate(zip(puzzle, read, strict=True))
        if drawn != found
    ]
    return "Misread " + "; ".join(wrong) + "." if wrong else "Every cell read right."


def _name(cell: str) -> str:
    return "an empty cell" if cell == "." else cell
