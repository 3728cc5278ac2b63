"""The adapter's task: sudokus with upright boxes, their held-out set and their check."""

from __future__ import annotations

import pytest

from pydiffusion.demo import sudoku, upright

# Boxes of 3 rows by 2 columns: 1 to 6 in each, worked out by hand.
SOLVED = "123456" "345612" "561234" "214365" "436521" "652143"  # fmt: skip


def boxes(grid: str) -> list[set[str]]:
    return [
        {grid[6 * (top + row) + left + column] for row in range(3) for column in range(2)}
        for top in (0, 3)
        for left in (0, 2, 4)
    ]


def rows_and_columns(grid: str) -> list[set[str]]:
    return [set(grid[6 * i : 6 * i + 6]) for i in range(6)] + [set(grid[i::6]) for i in range(6)]


def test_a_grid_transposed_twice_is_itself() -> None:
    assert upright.transposed(SOLVED) == "135246" "246135" "351462" "462351" "513624" "624513"  # fmt: skip
    assert upright.transposed(upright.transposed(SOLVED)) == SOLVED


def test_the_boxes_are_three_rows_by_two_columns() -> None:
    assert all(len(group) == 6 for group in [*boxes(SOLVED), *rows_and_columns(SOLVED)])
    assert upright.check("." * 36, sudoku.as_rows(SOLVED))
    wide = upright.transposed(SOLVED)
    assert sudoku.solves("." * 36, wide)
    assert not upright.check("." * 36, sudoku.as_rows(wide)), "a grid with boxes of 2 rows by 3 columns"


@pytest.mark.parametrize(
    "text", [SOLVED, "", "1", sudoku.as_rows("2" + SOLVED[1:]), sudoku.as_rows(SOLVED) + "\n1"]
)
def test_answers_that_are_wrong_or_laid_out_otherwise(text: str) -> None:
    assert not upright.check("." * 36, text)


def test_givens_must_be_kept() -> None:
    assert upright.check("1" + "." * 35, sudoku.as_rows(SOLVED))
    assert not upright.check("2" + "." * 35, sudoku.as_rows(SOLVED))


def test_held_out_puzzles_have_one_solution_with_upright_boxes() -> None:
    pairs = upright.held_out_puzzles(14)
    assert pairs[:3] == upright.held_out_puzzles(3)
    assert [36 - puzzle.count(".") for puzzle, _ in pairs] == [*range(12, 19)] * 2
    for puzzle, solution in pairs:
        assert all(len(group) == 6 for group in [*boxes(solution), *rows_and_columns(solution)])
        assert upright.check(puzzle, sudoku.as_rows(solution))
        assert sudoku.solutions(upright.transposed(puzzle)) == [upright.transposed(solution)]
        assert sudoku.is_held_out(upright.transposed(solution))
