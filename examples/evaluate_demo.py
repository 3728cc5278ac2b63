"""Evaluate the demo model on held-out puzzles: transformers and GGUF files, at several step limits.

Prints a Markdown table to stdout and progress to stderr. Each row is one runtime: the fraction of puzzles
solved and the mean number of denoising steps at each limit of --steps; then the fraction of correct answers
in the text tasks.

    python examples/evaluate_demo.py --transformers --types f32 q8_0 q4_k_m
    python examples/evaluate_demo.py --gguf demo-q4_k_m.gguf --steps 48 --number 100
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pydiffusion.demo import checkpoint_path, puzzles, tasks

Answers = Callable[[list[str], int, int], list[tuple[str, int]]]
"""(messages, max_tokens, step limit) -> (text, steps) for each message."""

TEXT_SEED = 20260101
MAX_TEXT_TOKENS = 144


def transformers_answers(checkpoint: Path, seed: int) -> Answers:
    """Generate with transformers in float32, prompts of equal length in one batch."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from demo_recipe.evaluate import answers, load_checkpoint

    model, tokenizer = load_checkpoint(checkpoint)

    def generate(messages: list[str], max_tokens: int, steps: int) -> list[tuple[str, int]]:
        torch.manual_seed(seed)
        return [(text, round(n)) for text, n in answers(model, tokenizer, messages, max_tokens, steps)]

    return generate


def gguf_answers(path: Path, seed: int) -> Answers:
    """Generate with pydiffusion, one prompt after the other, each in a new session."""
    from pydiffusion import DiffusionModel, GenerationOptions

    model = DiffusionModel(path)

    def generate(messages: list[str], max_tokens: int, steps: int) -> list[tuple[str, int]]:
        generated = []
        for index, message in enumerate(messages):
            options = GenerationOptions(max_tokens=max_tokens, steps=steps, seed=seed + index)
            prompt = model.chat_prompt([{"role": "user", "content": message}])
            completion = model.generate(prompt, options)
            generated.append((completion.text, completion.steps))
        return generated

    return generate


def evaluate(name: str, answers: Answers, arguments: argparse.Namespace) -> dict:
    """Evaluate the puzzles at every step limit and the text tasks at the largest one."""
    pairs = puzzles()[: arguments.number]
    prompts = [tasks.sudoku_prompt(puzzle) for puzzle, _ in pairs]
    result: dict = {"name": name, "sudoku": {}, "text": {}}
    for limit in arguments.steps:
        start = time.monotonic()
        generated = answers(prompts, 48, limit)
        result["sudoku"][limit] = {"n": len(prompts), **measure("sudoku", prompts, generated)}
        say(f"{name}: {limit} steps, {time.monotonic() - start:.0f} s: {result['sudoku'][limit]}")
    rng = random.Random(TEXT_SEED)
    for task in tasks.TASKS if arguments.text else ():
        if task == "sudoku":
            continue
        prompts = [tasks.generate(task, rng, held_out=True).prompt for _ in range(arguments.text)]
        generated = answers(prompts, MAX_TEXT_TOKENS, max(arguments.steps))
        result["text"][task] = {"n": len(prompts), **measure(task, prompts, generated)}
        say(f"{name}: {task}: {result['text'][task]}")
    return result


def measure(task: str, prompts: list[str], generated: list[tuple[str, int]]) -> dict[str, float]:
    """Return the fraction of correct answers and the mean number of steps."""
    right = sum(tasks.check(task, prompt, text) for prompt, (text, _) in zip(prompts, generated, strict=True))
    return {"share": right / len(prompts), "mean_steps": sum(steps for _, steps in generated) / len(prompts)}


def as_markdown(results: list[dict], steps: list[int]) -> str:
    """Format two tables: puzzles by step limit, and text tasks."""
    lines = [
        "| held-out puzzles solved (mean steps) | "
        + " | ".join(f"--steps {limit}" for limit in steps)
        + " |",
        "|---|" + "---|" * len(steps),
    ]
    for result in results:
        cells = [
            f"{100 * cell['share']:.1f}% ({cell['mean_steps']:.1f})" for cell in result["sudoku"].values()
        ]
        lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    names = list(results[0]["text"])
    if names:
        lines += [
            "",
            "| correct answers (mean steps) | " + " | ".join(names) + " |",
            "|---|" + "---|" * len(names),
        ]
        for result in results:
            cells = [
                f"{100 * cell['share']:.0f}% ({cell['mean_steps']:.1f})" for cell in result["text"].values()
            ]
            lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="folder to evaluate; default: the one in the package")
    parser.add_argument(
        "--transformers", action="store_true", help="evaluate with transformers (needs torch)"
    )
    parser.add_argument(
        "--types", nargs="*", default=[], help="convert the checkpoint to these types and evaluate them"
    )
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="evaluate these files")
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 8, 16, 24, 48], help="step limits")
    parser.add_argument("--number", type=int, default=None, help="number of puzzles; default: all")
    parser.add_argument("--text", type=int, default=100, help="examples per text task; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not (arguments.transformers or arguments.types or arguments.gguf):
        say("nothing to evaluate: pass --transformers, --types or --gguf")
        return 2
    checkpoint = arguments.checkpoint or checkpoint_path()
    results = []
    if arguments.transformers:
        answers = transformers_answers(checkpoint, arguments.seed)
        results.append(evaluate("transformers float32", answers, arguments))
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.types:
            from pydiffusion.convert import convert

            path = Path(folder) / f"demo-{kind}.gguf"
            convert(checkpoint, path, type=kind)
            results.append(evaluate(f"pydiffusion {kind}", gguf_answers(path, arguments.seed), arguments))
    for path in arguments.gguf:
        results.append(evaluate(path.name, gguf_answers(path, arguments.seed), arguments))
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results, arguments.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
