"""Pictures of sudokus that the demo model reads, and what is read from its features."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("PIL", reason="NOT CHECKED: the demo's pictures; Pillow is not installed")

from pydiffusion.demo import checkpoint_path, pictures, puzzles, reading, sudoku

PLAIN = pictures.Look(margins=(0.1, 0.1, 0.1, 0.1))


def test_a_seed_repeats_a_picture() -> None:
    def drawn(seed: int) -> bytes:
        rng = random.Random(seed)
        return pictures.draw(puzzles()[0][0], pictures.Look.random(rng), rng).tobytes()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("tilt", [0.0, pictures.MAX_TILT, -pictures.MAX_TILT])
def test_a_digit_is_drawn_in_its_cell(tilt: float) -> None:
    """Two pictures that differ by one digit differ in that cell alone, as `cells_at` has it."""
    look = replace(PLAIN, tilt=tilt, corners=((0.02, -0.01), (0.0, 0.02), (-0.02, 0.0), (0.01, 0.01)))
    points = (np.stack(np.meshgrid(np.arange(look.size), np.arange(look.size)), axis=-1) + 0.5) / look.size
    cells = pictures.cells_at(points, look)
    assert set(np.unique(cells)) == {-1, *range(sudoku.N_CELLS)}
    empty = np.asarray(pictures.draw("." * sudoku.N_CELLS, look, random.Random(0)), np.int16)
    for cell in (0, 5, 14, 21, 35):
        puzzle = "." * cell + "4" + "." * (sudoku.N_CELLS - 1 - cell)
        image = np.asarray(pictures.draw(puzzle, look, random.Random(0)), np.int16)
        changed = (abs(image - empty) > 60).any(-1)
        assert changed.sum() > 50
        assert set(cells[changed]) == {cell}


def test_random_pictures_show_every_cell_whole() -> None:
    """Tilt, perspective and margins leave the corners of the outermost cells in the picture."""
    rng = random.Random(3)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for _ in range(300):
        assert (pictures.cells_at(corners, pictures.Look.random(rng)) == -1).all()


def test_pictures_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="36 cells"):
        pictures.draw("123", PLAIN, random.Random(0))


def test_features_that_are_embeddings_are_read_back() -> None:
    embeddings = reading.character_embeddings(checkpoint_path())
    assert embeddings.shape == (7, 256)
    assert len(np.unique(embeddings, axis=0)) == 7
    puzzle, _ = puzzles()[5]
    features = np.zeros((reading.N_SOFT_TOKENS, 256), np.float32)
    for place, character in enumerate(sudoku.as_rows(puzzle)):
        if character != "\n":
            features[23 + place] = embeddings[reading.CHARACTERS.index(character)]
    noise = np.random.default_rng(0).normal(0, 0.3, features.shape).astype(np.float32)
    assert reading.read_cells(features + noise, embeddings) == puzzle


def test_a_picture_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="60 soft tokens"):
        reading.read_cells(np.zeros((60, 256), np.float32), reading.character_embeddings(checkpoint_path()))
