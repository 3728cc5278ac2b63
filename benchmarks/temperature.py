"""Measure what a caller's temperature does to the demo model's answers if it scales t_min and t_max.

    python benchmarks/temperature.py [0.7 1.3 ...] [--flat 0.01 0.2 ...] [--number 100] [--seeds 2]

Runs --number held-out examples of each task that the model has learned, each with --seeds seeds, the same
ones in every row, so that rows can be compared pair by pair: "difference" is the share right less the first
row's, with the standard error of the paired difference, and "z" their quotient. "equal" is the share of texts
identical to the first row's, "one text" the share of examples whose seeds all gave the same text.
--flat holds t_min and t_max at one value. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from denoising_options import MAX_TOKENS, questions

from pydiffusion import DiffusionModel, GenerationOptions
from pydiffusion.convert import convert
from pydiffusion.demo import checkpoint_path, tasks

# The schedule of the demo's file, and the reference's.
T_MIN, T_MAX = 0.4, 0.8


@dataclass(frozen=True)
class Answer:
    task: str
    text: str
    right: bool
    steps: int


def scaled(temperature: float) -> dict[str, float]:
    """The schedule's temperatures, multiplied."""
    return {"t_min": T_MIN * temperature, "t_max": T_MAX * temperature}


def answers(
    model: DiffusionModel, asked: list[tuple[str, str]], n_seeds: int, options: Mapping[str, float]
) -> list[Answer]:
    """The answers, all seeds of an example one after the other."""
    found = []
    for i, (task, question) in enumerate(asked):
        prompt = model.chat_prompt([{"role": "user", "content": question}])
        for seed in range(i * n_seeds, (i + 1) * n_seeds):
            chosen = GenerationOptions(max_tokens=MAX_TOKENS, seed=seed, **options)
            done = model.generate(prompt, chosen)
            found.append(Answer(task, done.text, tasks.check(task, question, done.text), done.steps))
    return found


def row(label: str, these: list[Answer], first: list[Answer], n_seeds: int) -> str:
    right = np.array([one.right for one in these], dtype=float)
    difference = right - [one.right for one in first]
    error = difference.std() / math.sqrt(len(difference))
    texts = np.array([one.text for one in these]).reshape(-1, n_seeds)
    cells = (
        label,
        f"{right.mean():.1%}",
        f"{difference.mean():+.1%} ± {error:.1%}",
        f"{difference.mean() / error:+.1f}" if error else "",
        f"{np.mean([one.steps for one in these]):.1f}",
        f"{np.mean([one.text == other.text for one, other in zip(these, first, strict=True)]):.0%}",
        f"{np.mean([len(set(own)) == 1 for own in texts]):.0%}",
        ", ".join(
            f"{np.mean([one.right for one in these if one.task == task]):.1%}"
            for task in dict.fromkeys(one.task for one in these)
        ),
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("temperatures", nargs="*", type=float, help="that multiply t_min and t_max")
    parser.add_argument("--flat", nargs="*", type=float, default=[], help="values of t_min = t_max")
    parser.add_argument("--number", type=int, default=100, help="examples per task")
    parser.add_argument("--seeds", type=int, default=2, help="seeds per example")
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, help="[default: all learned]")
    parser.add_argument("--type", default="f32", help="type of the file")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    asked = [pair for pair in questions(given.number) if pair[0] in (given.tasks or tasks.TASKS)]
    rows = {"1 (the schedule)": scaled(1.0)}
    rows |= {f"{t:g}": scaled(t) for t in given.temperatures}
    rows |= {f"t_min = t_max = {t:g}": {"t_min": t, "t_max": t} for t in given.flat}
    names = ", ".join(dict.fromkeys(task for task, _ in asked))
    print(f"| temperature | right | difference | z | steps | equal | one text | {names} |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "demo.gguf"
        convert(checkpoint_path(), path, given.type)
        with DiffusionModel(path, n_threads=given.threads) as model:
            first = None
            for label, options in rows.items():
                these = answers(model, asked, given.seeds, options)
                first = first or these
                print(row(label, these, first, given.seeds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
