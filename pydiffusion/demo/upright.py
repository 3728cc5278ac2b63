"""Sudokus with upright boxes, 3 rows by 2 columns: the demo model can't solve them, with its adapter it can.

They are asked for as the others are (`tasks.sudoku_prompt`). Each is a puzzle of `sudoku` with rows and
columns exchanged, so it is held out, as that is, by its solution.
"""

from __future__ import annotations

import random
from importlib.resources import as_file, files
from pathlib import Path

from . import sudoku

__all__ = ["MAX_GIVENS", "adapter_path", "check", "held_out_puzzles", "transposed"]

MAX_GIVENS = 18
"""With more, rows and columns alone often lead to the solution, whatever the boxes."""

_SEED = 2027


def transposed(grid: str) -> str:
    """`grid`, 36 characters row by row, with rows and columns exchanged."""
    return "".join(grid[row :: sudoku.SIZE] for row in range(sudoku.SIZE))


def held_out_puzzles(n: int) -> list[tuple[str, str]]:
    """The first `n` puzzles of the evaluation, with their solutions, both 36 characters row by row.

    12 to 18 givens in turn, one solution each. No solution, even with its digits renamed, belongs to a puzzle
    of the adapter's training or, transposed, of the demo model's.
    """
    rng = random.Random(_SEED)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        n_givens = sudoku.MIN_GIVENS + len(pairs) % (MAX_GIVENS - sudoku.MIN_GIVENS + 1)
        solution = sudoku.draw_grid(rng)
        if not sudoku.is_held_out(solution):
            continue
        puzzle = sudoku.thin_out(solution, n_givens, rng)
        if puzzle.count(".") == sudoku.N_CELLS - n_givens:
            pairs.append((transposed(puzzle), transposed(solution)))
    return pairs


def check(puzzle: str, text: str) -> bool:
    """Whether `text` is the solution of `puzzle`, laid out as asked; white space around it doesn't matter."""
    grid = text.strip().replace("\n", "")
    return text.strip() == sudoku.as_rows(grid) and sudoku.solves(transposed(puzzle), transposed(grid))


def adapter_path() -> Path:
    """The folder of the demo model's adapter for these puzzles, as PEFT saved it.

    Raises FileNotFoundError when the package was installed without it.
    """
    with as_file(files(__package__) / "upright_lora") as folder:
        if not (folder / "adapter_model.safetensors").is_file():
            raise FileNotFoundError(
                f"the demo's adapter is missing from {folder}: reinstall pydiffusion, or make it again with "
                "examples/tune_lora.py"
            )
        return folder
