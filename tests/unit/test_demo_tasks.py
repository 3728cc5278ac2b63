"""The demo's tasks: sudoku solver and puzzles, generators and checkers, the held-out set."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pydiffusion.demo import puzzles, sudoku, tasks

SOLVED = "126345345216514632263154432561651423"


def test_the_example_grid_is_laid_out_row_by_row() -> None:
    assert sudoku.as_rows(SOLVED).split("\n") == ["126345", "345216", "514632", "263154", "432561", "651423"]


def test_a_full_grid_has_itself_as_only_solution() -> None:
    assert sudoku.solutions(SOLVED) == [SOLVED]


def test_contradicting_givens_have_no_solution() -> None:
    assert sudoku.solutions("11" + "." * 34) == []
    # Column 0: 1 to 5 below the first row, and a 6 beside the corner: nothing is left for the corner.
    assert sudoku.solutions(".6...." + "1....." + "2....." + "3....." + "4....." + "5.....") == []


def test_exchangeable_digits_give_two_solutions() -> None:
    puzzle = SOLVED.replace("1", ".").replace("2", ".")
    found = sudoku.solutions(puzzle, limit=10)
    assert len(found) >= 2
    assert len(set(found)) == len(found)
    assert all(sudoku.solves(puzzle, grid) for grid in found)


def test_limit_bounds_the_search() -> None:
    assert len(sudoku.solutions("." * 36, limit=7)) == 7


@pytest.mark.parametrize("puzzle", ["", "." * 35, "." * 37, "0" + "." * 35, "7" + "." * 35])
def test_malformed_puzzles_are_refused(puzzle: str) -> None:
    with pytest.raises(ValueError, match="36 cells"):
        sudoku.solutions(puzzle)


@pytest.mark.parametrize("cell", [0, 17, 35])
def test_solves_notices_one_wrong_cell(cell: int) -> None:
    wrong = "2" if SOLVED[cell] != "2" else "1"
    grid = SOLVED[:cell] + wrong + SOLVED[cell + 1 :]
    assert sudoku.solves("." * 36, SOLVED)
    assert not sudoku.solves("." * 36, grid)


def test_solves_notices_a_valid_grid_that_drops_a_given() -> None:
    other = SOLVED.translate(str.maketrans("12", "21"))
    assert sudoku.solves("." * 36, other)
    assert not sudoku.solves("1" + "." * 35, other)
    assert not sudoku.solves("." * 36, SOLVED[:-1])
    assert not sudoku.solves("." * 36, SOLVED[:-1] + ".")


def test_drawn_puzzles_have_one_solution_and_the_givens_asked_for() -> None:
    rng = random.Random(3)
    for n_givens in (12, 18, 24):
        puzzle, solution = sudoku.draw_puzzle(rng, n_givens)
        assert 36 - puzzle.count(".") == n_givens
        assert sudoku.solutions(puzzle, limit=5) == [solution]
    with pytest.raises(ValueError, match="between 10 and 36"):
        sudoku.draw_puzzle(rng, 3)


def test_relabelling_and_the_held_out_side_ignore_the_names_of_digits() -> None:
    rng = random.Random(5)
    for _ in range(50):
        grid = sudoku.draw_grid(rng)
        renamed = grid.translate(str.maketrans("123456", "".join(rng.sample("123456", 6))))
        assert sudoku.relabelled(grid) == sudoku.relabelled(renamed)
        assert sudoku.is_held_out(grid) == sudoku.is_held_out(renamed)


def test_shipped_puzzles_are_many_unique_and_on_the_held_out_side() -> None:
    pairs = puzzles()
    assert len(pairs) >= 500
    assert len({sudoku.relabelled(puzzle) for puzzle, _ in pairs}) == len(pairs)
    for puzzle, solution in pairs:
        assert sudoku.solutions(puzzle, limit=2) == [solution]
        assert sudoku.is_held_out(solution)
    givens = Counter(36 - puzzle.count(".") for puzzle, _ in pairs)
    assert min(givens) == sudoku.MIN_GIVENS
    assert max(givens) == sudoku.MAX_GIVENS


def test_training_examples_share_no_solution_with_the_shipped_puzzles() -> None:
    held_out = {sudoku.relabelled(solution) for _, solution in puzzles()}
    rng = random.Random(11)
    for _ in range(200):
        answer = tasks.generate("sudoku", rng, held_out=False).answer
        assert sudoku.relabelled(answer.replace("\n", "")) not in held_out


@pytest.mark.parametrize("task", list(tasks.TASKS))
@pytest.mark.parametrize("held_out", [False, True])
def test_every_example_passes_its_own_check_and_stays_on_its_side(task: str, held_out: bool) -> None:
    rng = random.Random(17)
    for _ in range(20):
        example = tasks.generate(task, rng, held_out=held_out)
        assert example.task == task
        assert tasks.check(task, example.prompt, example.answer)
        assert tasks.check(task, example.prompt, f" {example.answer}\n")
        if task != "sudoku":
            assert tasks.is_held_out(example.prompt) == held_out


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_a_seed_repeats_the_examples(task: str) -> None:
    first, second = random.Random(23), random.Random(23)
    assert [tasks.generate(task, first, held_out=True) for _ in range(5)] == [
        tasks.generate(task, second, held_out=True) for _ in range(5)
    ]


@pytest.mark.parametrize(
    ("task", "prompt", "right", "wrong"),
    [
        ("sort", "sort: d a c", "a c d", ["a d c", "a c", "acd", "", "a c d d"]),
        ("reverse", "reverse: 3 1 2", "2 1 3", ["3 1 2", "2 1", "1 2 3"]),
        ("add", "add: 47+38", "85", ["84", "085", "", "8 5"]),
        ("count", "count: 9 to 11", "9 10 11", ["9 10", "9 10 11 12", "9 11"]),
        (
            "json",
            "json: Ada, 34, from Rome.",
            '{"name":"Ada","age":34,"city":"Rome"}',
            [
                '{"name":"Ada","age":"34","city":"Rome"}',
                '{"name":"Ada","age":34}',
                "Ada",
                '{"name":"Ada"',
                "[]",
            ],
        ),
        (
            "sudoku",
            tasks.sudoku_prompt("1" + "." * 35),
            sudoku.as_rows(SOLVED),
            [SOLVED, SOLVED[:6], "", "x" * 36],
        ),
    ],
)
def test_checkers_tell_right_from_wrong(task: str, prompt: str, right: str, wrong: list[str]) -> None:
    assert tasks.check(task, prompt, right)
    for text in wrong:
        assert not tasks.check(task, prompt, text), text


def test_json_may_be_laid_out_differently() -> None:
    assert tasks.check("json", "json: Ada, 34, from Rome.", '{ "city": "Rome", "name": "Ada", "age": 34 }')


def test_unknown_tasks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown task 'chess'"):
        tasks.generate("chess", random.Random(0), held_out=True)
    with pytest.raises(ValueError, match="unknown task 'chess'"):
        tasks.check("chess", "", "")
