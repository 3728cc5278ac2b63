"""Measure how dropped_mass, canvas_length and trim_after_eos affect the demo model's accuracy and steps.

    python benchmarks/denoising_options.py [dropped_mass] [canvas_length] [trim_after_eos] [--number 20]

Runs --number held-out examples of each task that the model has learned, with equal seeds. Rows differ from
the first row of their table in one option. "equal" is the share of answers identical to the first row's;
"positions" is the number of canvas positions denoised over all steps of an answer, in thousands, which
determines the work. Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pydiffusion import CanvasEvent, DiffusionModel, DraftEvent, GenerationOptions
from pydiffusion.convert import convert
from pydiffusion.demo import checkpoint_path, puzzles, tasks

SEED = 20261121
MAX_TOKENS = 144
VALUES = {
    "dropped_mass": (0.0, 1e-4, 1e-3, 1e-2),
    "canvas_length": (48, 40, 32, 24),
    "trim_after_eos": (False, True),
}


@dataclass(frozen=True)
class Answer:
    text: str
    right: bool
    n_tokens: int
    n_steps: int
    n_positions: int
    n_canvases: int


def questions(number: int) -> list[tuple[str, str]]:
    """Return held-out (task, prompt) pairs."""
    rng = random.Random(SEED)
    found = [("sudoku", tasks.sudoku_prompt(puzzle)) for puzzle, _ in puzzles()[:number]]
    for task in tasks.TASKS:
        if task not in ("sudoku", "count"):  # the model has not learned to count: docs/demo-model.md
            found += [(task, tasks.generate(task, rng, held_out=True).prompt) for _ in range(number)]
    return found


def answer(model: DiffusionModel, task: str, prompt: str, options: GenerationOptions) -> Answer:
    session = model.new_session(512)
    session.encode(model.chat_prompt([{"role": "user", "content": prompt}]))
    events = list(session.generate(options))
    canvases = [event for event in events if isinstance(event, CanvasEvent)]
    text = "".join(event.text for event in canvases)
    return Answer(
        text,
        tasks.check(task, prompt, text),
        sum(len(event.tokens) for event in canvases),
        sum(event.steps for event in canvases),
        sum(len(event.tokens) for event in events if isinstance(event, DraftEvent)),
        len(canvases),
    )


def row(label: str, answers: list[Answer], first: list[Answer]) -> str:
    share = np.mean([one.right for one in answers])
    steps, canvases = (sum(getattr(one, name) for one in answers) for name in ("n_steps", "n_canvases"))
    cells = (
        label,
        f"{share:.1%} ± {np.sqrt(share * (1 - share) / len(answers)):.1%}",
        f"{steps / canvases:.1f}",
        f"{steps / len(answers):.1f}",
        f"{np.mean([one.n_positions for one in answers]) / 1000:.2f}",
        f"{np.mean([one.n_tokens for one in answers]):.1f}",
        f"{np.mean([one.text == other.text for one, other in zip(answers, first, strict=True)]):.0%}",
    )
    return f"| {' | '.join(cells)} |"


def by_task(asked: list[tuple[str, str]], answers: list[Answer]) -> str:
    right: dict[str, list[bool]] = {}
    for (task, _), one in zip(asked, answers, strict=True):
        right.setdefault(task, []).append(one.right)
    return ", ".join(f"{task} {sum(found)}/{len(found)}" for task, found in right.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", nargs="*", choices=VALUES, default=list(VALUES), help="[default: all]")
    parser.add_argument("--number", type=int, default=20, help="examples per task")
    parser.add_argument(
        "--tasks", nargs="+", choices=tasks.TASKS, help="[default: all that the model has learned]"
    )
    parser.add_argument("--type", default="f32", help="type of the file")
    parser.add_argument("--threads", type=int, help="[default: all; use 1 on a busy machine]")
    arguments = parser.parse_args()
    asked = questions(arguments.number)
    asked = [(task, prompt) for task, prompt in asked if task in (arguments.tasks or tasks.TASKS)]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "demo.gguf"
        convert(checkpoint_path(), path, arguments.type)
        model = DiffusionModel(path, n_threads=arguments.threads)
        for name in arguments.options:
            first = None
            print(f"| {name} | right | steps per canvas | steps | positions | tokens | equal |")
            print("|---|---|---|---|---|---|---|")
            for value in VALUES[name]:
                answers = []
                for index, (task, prompt) in enumerate(asked):
                    options = GenerationOptions(max_tokens=MAX_TOKENS, seed=index, **{name: value})
                    answers.append(answer(model, task, prompt, options))
                first = first or answers
                print(row(f"{value:g}", answers, first), flush=True)
                print(f"{name} {value:g}: {by_task(asked, answers)}", file=sys.stderr, flush=True)
        model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
