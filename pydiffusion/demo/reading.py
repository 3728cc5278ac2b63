"""The cells that the demo model's vision tower reads in a picture: the characters nearest to its features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import sudoku

__all__ = ["N_SOFT_TOKENS", "character_embeddings", "read_cells"]

CHARACTERS = ".123456"
N_SOFT_TOKENS = 64
"""Soft tokens of a square picture; the last 41 stand for six rows of cells with line breaks between."""
_TABLE = "model.decoder.embed_tokens.weight"


def read_cells(features: npt.NDArray[np.float32], embeddings: npt.NDArray[np.float32]) -> str:
    """The 36 cells, `1` to `6` and `.`, that a picture's features stand for.

    features: (64, d) of a square picture. embeddings: as of `character_embeddings`.
    Raises ValueError for another number of soft tokens: the picture wasn't square.
    """
    if len(features) != N_SOFT_TOKENS:
        raise ValueError(
            f"the picture gave {len(features)} soft tokens, not {N_SOFT_TOKENS}:"
            " the demo model reads square pictures"
        )
    n_characters = sudoku.N_CELLS + sudoku.SIZE - 1
    places = [place for place in range(n_characters) if place % (sudoku.SIZE + 1) < sudoku.SIZE]
    cells = features[-n_characters:][places]
    distances = ((cells[:, None] - embeddings) ** 2).sum(-1)
    return "".join(CHARACTERS[index] for index in distances.argmin(-1))


def character_embeddings(checkpoint: Path) -> npt.NDArray[np.float32]:
    """(7, d) float32: embeddings of `.` and `1` to `6`, as the text model reads them, from a checkpoint."""
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    with (checkpoint / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[_TABLE]
        start, end = entry["data_offsets"]
        file.seek(8 + size + start)
        bits = np.frombuffer(file.read(end - start), "<u2").reshape(entry["shape"])
    rows = bits[[vocabulary[character] for character in CHARACTERS]].astype(np.uint32) << 16
    return rows.view(np.float32) * np.float32(bits.shape[1] ** 0.5)
