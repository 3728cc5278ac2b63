"""6x6 sudoku: grids, a solver that counts solutions, puzzles with exactly one.

A grid is a string of 36 characters, row by row: `1` to `6`, and `.` for an empty cell. Boxes are two rows
high and three columns wide.
"""

from __future__ import annotations

import random
import zlib

SIZE = 6
BOX_ROWS = 2
BOX_COLUMNS = 3
N_CELLS = SIZE * SIZE
MIN_GIVENS = 12
MAX_GIVENS = 24
HELD_OUT_SHARE = 20
"""One in this many solution grids, counted up to relabelling, is kept out of training."""

_ALL = (1 << SIZE) - 1
_ROW = tuple(cell // SIZE for cell in range(N_CELLS))
_COLUMN = tuple(cell % SIZE for cell in range(N_CELLS))
_BOX = tuple(
    cell // SIZE // BOX_ROWS * (SIZE // BOX_COLUMNS) + cell % SIZE // BOX_COLUMNS for cell in range(N_CELLS)
)


def as_rows(grid: str) -> str:
    """The grid with a line break after each row but the last, as prompts and answers show it."""
    return "\n".join(grid[start : start + SIZE] for start in range(0, len(grid), SIZE))


def solutions(puzzle: str, limit: int = 2, rng: random.Random | None = None) -> list[str]:
    """Up to `limit` solutions of `puzzle`; with `rng`, digits are tried in random order.

    Raises ValueError when the puzzle isn't 36 cells of `1` to `6` and `.`. Givens that contradict each other
    simply have no solution.
    """
    if len(puzzle) != N_CELLS or not set(puzzle) <= set("123456."):
        raise ValueError(f"a 6x6 puzzle is 36 cells of 1 to 6 and '.', row by row; got {puzzle!r}")
    rows, columns, boxes = [_ALL] * SIZE, [_ALL] * SIZE, [_ALL] * SIZE
    grid = [0] * N_CELLS
    empty = []
    for cell, digit in enumerate(puzzle):
        if digit == ".":
            empty.append(cell)
            continue
        bit = 1 << (int(digit) - 1)
        if not rows[_ROW[cell]] & columns[_COLUMN[cell]] & boxes[_BOX[cell]] & bit:
            return []
        grid[cell] = bit
        rows[_ROW[cell]] ^= bit
        columns[_COLUMN[cell]] ^= bit
        boxes[_BOX[cell]] ^= bit
    found: list[str] = []
    _search(grid, empty, rows, columns, boxes, found, limit, rng)
    return found


def _search(
    grid: list[int],
    empty: list[int],
    rows: list[int],
    columns: list[int],
    boxes: list[int],
    found: list[str],
    limit: int,
    rng: random.Random | None,
) -> None:
    """Depth first, always on the empty cell with the fewest candidates; appends to `found` until `limit`."""
    if not empty:
        found.append("".join(str(bit.bit_length()) for bit in grid))
        return
    best, best_candidates, fewest = 0, 0, SIZE + 1
    for index, cell in enumerate(empty):
        candidates = rows[_ROW[cell]] & columns[_COLUMN[cell]] & boxes[_BOX[cell]]
        count = candidates.bit_count()
        if count < fewest:
            best, best_candidates, fewest = index, candidates, count
            if count <= 1:
                break
    if fewest == 0:
        return
    cell = empty[best]
    rest = empty[:best] + empty[best + 1 :]
    row, column, box = _ROW[cell], _COLUMN[cell], _BOX[cell]
    bits = [1 << digit for digit in range(SIZE) if best_candidates >> digit & 1]
    if rng is not None:
        rng.shuffle(bits)
    for bit in bits:
        grid[cell] = bit
        rows[row] ^= bit
        columns[column] ^= bit
        boxes[box] ^= bit
        _search(grid, rest, rows, columns, boxes, found, limit, rng)
        rows[row] ^= bit
        columns[column] ^= bit
        boxes[box] ^= bit
        if len(found) >= limit:
            return


def solves(puzzle: str, grid: str) -> bool:
    """Whether `grid` is complete, breaks no rule and keeps every given of `puzzle`."""
    if len(grid) != N_CELLS or len(puzzle) != N_CELLS or not set(grid) <= set("123456"):
        return False
    if any(given not in (".", digit) for given, digit in zip(puzzle, grid, strict=True)):
        return False
    groups = {
        (kind, index[cell], grid[cell])
        for kind, index in enumerate((_ROW, _COLUMN, _BOX))
        for cell in range(N_CELLS)
    }
    return len(groups) == 3 * N_CELLS


def draw_grid(rng: random.Random) -> str:
    """A random solved grid; every grid can come up."""
    return solutions("." * N_CELLS, limit=1, rng=rng)[0]


def draw_puzzle(rng: random.Random, n_givens: int) -> tuple[str, str]:
    """A puzzle with `n_givens` givens and exactly one solution, and that solution.

    Cells are emptied in random order as long as the solution stays the only one; a grid from which `n_givens`
    can't be reached is given up for another. Raises ValueError for fewer than 10 givens, which few grids
    allow.
    """
    if not 10 <= n_givens <= N_CELLS:
        raise ValueError(f"n_givens must be between 10 and {N_CELLS}, got {n_givens}")
    while True:
        solution = draw_grid(rng)
        puzzle = thin_out(solution, n_givens, rng)
        if puzzle.count(".") == N_CELLS - n_givens:
            return puzzle, solution


def thin_out(solution: str, n_givens: int, rng: random.Random) -> str:
    """Empty cells of `solution` at random while it stays the only one, down to `n_givens` at best."""
    puzzle = list(solution)
    left = N_CELLS
    for cell in rng.sample(range(N_CELLS), N_CELLS):
        if left == n_givens:
            break
        puzzle[cell] = "."
        if len(solutions("".join(puzzle))) == 1:
            left -= 1
        else:
            puzzle[cell] = solution[cell]
    return "".join(puzzle)


def relabelled(grid: str) -> str:
    """The grid with its digits renamed in the order of their first appearance: equal for all relabellings."""
    names: dict[str, str] = {}
    return "".join(cell if cell == "." else names.setdefault(cell, str(len(names) + 1)) for cell in grid)


def is_held_out(solution: str) -> bool:
    """Whether puzzles with this solution belong to the evaluation.

    Decided by a checksum of the relabelled solution, so a held-out puzzle shares its solution, even up to
    relabelling, with no training puzzle.
    """
    return zlib.crc32(relabelled(solution).encode()) % HELD_OUT_SHARE == 0
