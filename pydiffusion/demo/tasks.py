"""The tasks of the demo model: prompts, answers and checks, with nothing but the standard library.

Every task is a pair of texts, a user message and the answer that the model should give to it in a chat, made
from a `random.Random`, so that training, evaluation and tests draw from the same source and a seed repeats a
run. A part of every task's examples is *held out* by a rule on the example itself (see `is_held_out`), so
that nothing seen in training can turn up in an evaluation.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from . import sudoku

__all__ = ["TASKS", "Example", "Task", "check", "generate", "is_held_out", "sudoku_example", "sudoku_prompt"]

HELD_OUT_SHARE = 20
"""One text example in this many is kept out of training."""


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        task: name of the task, a key of `TASKS`.
        prompt: the user's message, as it goes into the chat template.
        answer: the text expected back, without any end marker.
    """

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: what `generate` and `TASKS` call it.
        description: one line for people.
        draw: makes an example from a random generator.
        check: whether a model's text answers the prompt correctly; takes (prompt, text).
    """

    name: str
    description: str
    draw: Callable[[random.Random], Example]
    check: Callable[[str, str], bool]


def is_held_out(prompt: str) -> bool:
    """Whether a text example belongs to the evaluation; decided by a checksum of its prompt."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


# --- sudoku -------------------------------------------------------------------------------------------------


def sudoku_prompt(puzzle: str) -> str:
    """The message that asks for the solution of `puzzle`, 36 characters of `1` to `6` and `.`, row by row."""
    return "sudoku\n" + sudoku.as_rows(puzzle)


def sudoku_example(puzzle: str, solution: str) -> Example:
    """The example for a puzzle whose solution is known; both are 36 characters."""
    return Example("sudoku", sudoku_prompt(puzzle), sudoku.as_rows(solution))


def _draw_sudoku(rng: random.Random) -> Example:
    puzzle, solution = sudoku.draw_puzzle(rng, rng.randint(sudoku.MIN_GIVENS, sudoku.MAX_GIVENS))
    return sudoku_example(puzzle, solution)


def _check_sudoku(prompt: str, text: str) -> bool:
    """Right when it is laid out as asked, keeps every given and breaks no rule."""
    puzzle = prompt.removeprefix("sudoku\n").replace("\n", "")
    grid = text.strip().replace("\n", "")
    return text.strip() == sudoku.as_rows(grid) and sudoku.solves(puzzle, grid)


# --- lists of letters and digits ----------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"


def _draw_items(rng: random.Random) -> list[str]:
    pool = LETTERS if rng.random() < 0.7 else DIGITS
    return rng.sample(pool, rng.randint(3, 9))


def _draw_sort(rng: random.Random) -> Example:
    items = _draw_items(rng)
    return Example("sort", "sort: " + " ".join(items), " ".join(sorted(items)))


def _check_sort(prompt: str, text: str) -> bool:
    return text.strip() == " ".join(sorted(prompt.removeprefix("sort: ").split()))


def _draw_reverse(rng: random.Random) -> Example:
    items = _draw_items(rng)
    return Example("reverse", "reverse: " + " ".join(items), " ".join(reversed(items)))


def _check_reverse(prompt: str, text: str) -> bool:
    return text.strip() == " ".join(reversed(prompt.removeprefix("reverse: ").split()))


# --- arithmetic ---------------------------------------------------------------------------------------------


def _draw_add(rng: random.Random) -> Example:
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    return Example("add", f"add: {left}+{right}", str(left + right))


def _check_add(prompt: str, text: str) -> bool:
    return text.strip() == str(sum(int(number) for number in prompt.removeprefix("add: ").split("+")))


# --- a JSON record from a sentence --------------------------------------------------------------------------

NAMES = (
    "Ada", "Amir", "Anna", "Aoife", "Bela", "Bo", "Carla", "Chen", "Clara", "Dana", "David", "Dina",
    "Elif", "Emil", "Emma", "Erik", "Eva", "Farah", "Felix", "Finn", "Gita", "Greta", "Hana",
    "Hugo", "Ida", "Igor", "Ines", "Ivan", "Jana", "Jin", "Jonas", "Julia", "Kai", "Karim", "Lars",
    "Lea", "Leo", "Lina", "Luca", "Maja", "Marco", "Maria", "Mateo", "Mei", "Mila", "Nadia", "Nils",
    "Nina", "Noah", "Olga", "Omar", "Otto", "Paul", "Petra", "Priya", "Rami", "Rosa", "Ruth", "Sam",
    "Sara", "Sofia", "Tariq", "Tess", "Theo", "Tom", "Uma", "Vera", "Viktor", "Wei", "Yara",
    "Yusuf", "Zoe",
)  # fmt: skip
CITIES = (
    "Accra", "Athens", "Bergen", "Berlin", "Bern", "Bonn", "Brno", "Cairo", "Cork", "Dakar",
    "Delhi", "Dublin", "Essen", "Faro", "Gdansk", "Ghent", "Graz", "Hanoi", "Kyiv", "Lagos",
    "Leeds", "Lima", "Linz", "Lyon", "Madrid", "Malmo", "Milan", "Nairobi", "Nice", "Oslo", "Paris",
    "Porto", "Prague", "Quito", "Riga", "Rome", "Seoul", "Split", "Tallinn", "Tokyo", "Tunis",
    "Turin", "Turku", "Vienna", "Vilnius", "Warsaw", "York", "Zagreb", "Zurich",
)  # fmt: skip
SENTENCES = (
    "{name} is {age} and lives in {city}.",
    "{name}, {age}, from {city}.",
    "In {city} lives {name}, {age}.",
)


def _draw_json(rng: random.Random) -> Example:
    name, age, city = rng.choice(NAMES), rng.randint(10, 99), rng.choice(CITIES)
    sentence = rng.choice(SENTENCES).format(name=name, age=age, city=city)
    return Example("json", "json: " + sentence, _record(name, age, city))


def _record(name: str, age: int, city: str) -> str:
    return json.dumps({"name": name, "age": age, "city": city}, separators=(",", ":"))


def _check_json(prompt: str, text: str) -> bool:
    """Right when it parses to the record that the sentence holds, whatever the white space."""
    try:
        record = json.loads(text)
    except ValueError:
        return False
    words = prompt.removeprefix("json: ").replace(",", " ").replace(".", " ").split()
    expected = {
        "name": next(word for word in words if word in NAMES),
        "age": next(int(word) for word in words if word.isdecimal()),
        "city": next(word for word in words if word in CITIES),
    }
    return record == expected


# --- counting, which fills more than one canvas -------------------------------------------------------------


def _draw_count(rng: random.Random) -> Example:
    first = rng.randint(1, 60)
    last = first + rng.randint(2, 35)
    return Example("count", f"count: {first} to {last}", " ".join(map(str, range(first, last + 1))))


def _check_count(prompt: str, text: str) -> bool:
    first, last = (int(word) for word in prompt.removeprefix("count: ").split(" to "))
    return text.strip() == " ".join(map(str, range(first, last + 1)))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sudoku", "solve a 6x6 sudoku", _draw_sudoku, _check_sudoku),
        Task("sort", "put letters or digits in order", _draw_sort, _check_sort),
        Task("reverse", "turn a list round", _draw_reverse, _check_reverse),
        Task("add", "add two numbers of two digits", _draw_add, _check_add),
        Task("json", "write a sentence's facts as a JSON record", _draw_json, _check_json),
        Task("count", "count from one number to another, over several canvases", _draw_count, _check_count),
    )
}


def generate(task: str, rng: random.Random, *, held_out: bool) -> Example:
    """Draw an example of `task` (a key of `TASKS`), from the training side or from the held-out side.

    For sudoku the sides are told apart by the solution grid (`sudoku.is_held_out`), for the rest by the
    prompt.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    while True:
        example = TASKS[task].draw(rng)
        if task == "sudoku":
            side = sudoku.is_held_out(example.answer.replace("\n", ""))
        else:
            side = is_held_out(example.prompt)
        if side == held_out:
            return example


def check(task: str, prompt: str, text: str) -> bool:
    """Whether `text` answers `prompt` correctly; surrounding white space doesn't matter."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    return TASKS[task].check(prompt, text)
