"""Generate the held-out sudokus included in the package (deterministic).

python examples/make_held_out.py pydiffusion/demo/held_out.txt
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from pydiffusion.demo import sudoku

HEADER = """\
# 6x6 sudokus kept out of the demo model's training: puzzle, then solution, row by row, '.' for an empty cell.
# Each has exactly one solution; no solution, even with its digits renamed, belongs to a training puzzle.
# Made by examples/make_held_out.py; 12 to 24 givens in turn.
"""


def draw(n: int, seed: int) -> list[tuple[str, str]]:
    """Generate `n` held-out puzzles, no two of them equal up to relabelling."""
    rng = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(pairs) < n:
        n_givens = sudoku.MIN_GIVENS + len(pairs) % (sudoku.MAX_GIVENS - sudoku.MIN_GIVENS + 1)
        solution = sudoku.draw_grid(rng)
        if not sudoku.is_held_out(solution):
            continue
        puzzle = sudoku.thin_out(solution, n_givens, rng)
        key = sudoku.relabelled(puzzle)
        if puzzle.count(".") == sudoku.N_CELLS - n_givens and key not in seen:
            seen.add(key)
            pairs.append((puzzle, solution))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--number", type=int, default=520)
    parser.add_argument("--seed", type=int, default=2026)
    arguments = parser.parse_args()
    lines = [f"{puzzle} {solution}\n" for puzzle, solution in draw(arguments.number, arguments.seed)]
    temporary = arguments.output.with_suffix(".part")
    temporary.write_text(HEADER + "".join(lines), encoding="ascii")
    temporary.replace(arguments.output)


if __name__ == "__main__":
    main()
