"""``pydiffusion demo --lora``: a sudoku that the demo model can't solve, without and with its adapter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ._open import adapters_of
from ._run import SECONDS_PER_STEP, prefill, run
from ._text import say

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel, GenerationOptions

_N_PUZZLES = 100


def chosen_adapters(given: str | None) -> list[tuple[str | Path, float]]:
    """The adapter PATH[:SCALE], or the one in the package. Raises FileNotFoundError if that is missing."""
    from pydiffusion.demo import upright

    return list(adapters_of([given])) if given is not None else [(upright.adapter_path(), 1.0)]


def solve_upright(
    model: DiffusionModel,
    adapters: list[tuple[str | Path, float]],
    puzzle: int | None,
    options: GenerationOptions,
) -> None:
    """Print a held-out puzzle, and the answers without and with the adapters, with their verdicts.

    puzzle: its index; None: by the options' seed.
    """
    from pydiffusion.demo import sudoku, tasks, upright

    if puzzle is None:
        puzzle = random.Random(options.seed).randrange(_N_PUZZLES)
    if not 0 <= puzzle < _N_PUZZLES:
        raise typer.BadParameter(f"--puzzle is {puzzle}; with --lora permitted is 0 to {_N_PUZZLES - 1}")
    loaded = [(model.load_lora(source), scale) for source, scale in adapters]  # before the long half
    cells, solution = upright.held_out_puzzles(puzzle + 1)[puzzle]
    say(f"held-out puzzle {puzzle} of {_N_PUZZLES}; its boxes are 3 rows by 2 columns")
    prompt = tasks.sudoku_prompt(cells)
    print(prompt, flush=True)
    ids = model.chat_prompt([{"role": "user", "content": prompt}])
    for title, lora in (("Without the adapter:", ()), ("With it:", loaded)):
        print(f"\n{title}\n", flush=True)
        session = model.new_session(lora=lora)
        prefill(session, ids)
        done = run(model, session, options, show=True, seconds_per_step=SECONDS_PER_STEP)
        verdict = "Right" if upright.check(cells, done.text) else "Wrong"
        print(f"\n{verdict}, after {done.steps} steps.")
    print(f"\nThe solution:\n\n{sudoku.as_rows(solution)}")
