"""Evaluate the demo model on sudokus with upright boxes, without and with its adapter.

Prints a Markdown table to stdout and progress to stderr: for transformers with PEFT and for GGUF files of
several types, the fraction of held-out puzzles solved, with its standard error, and the mean number of
denoising steps. After transformers, also the difference from it on the same puzzles.

    python examples/evaluate_lora.py --transformers --types f32 q8_0 q4_k_m
    python examples/evaluate_lora.py --types q8_0 --lora build/upright_lora --number 100 --only-after
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pydiffusion.demo import checkpoint_path, tasks, upright

Answer = tuple[str, float]
"""Text and number of steps."""

MAX_TOKENS = 48


def transformers_answers(messages: list[str], adapter: Path | None, seed: int) -> list[Answer]:
    """Generate with transformers in float32, the adapter applied by PEFT."""
    import torch
    from peft import PeftModel

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from demo_recipe.evaluate import answers, load_checkpoint

    model, tokenizer = load_checkpoint(checkpoint_path())
    if adapter is not None:
        PeftModel.from_pretrained(model, adapter)  # puts its matrices beside the model's
        model.eval()
    torch.manual_seed(seed)
    return answers(model, tokenizer, messages, MAX_TOKENS)


def gguf_answers(path: Path, messages: list[str], adapter: Path | None, seed: int) -> list[Answer]:
    """Generate with pydiffusion, every message with a seed of its own."""
    from pydiffusion import DiffusionModel, GenerationOptions

    with DiffusionModel(path, lora=[] if adapter is None else [adapter]) as model:
        prompts = [model.chat_prompt([{"role": "user", "content": message}]) for message in messages]
        options = [
            GenerationOptions(max_tokens=MAX_TOKENS, seed=seed + index) for index in range(len(prompts))
        ]
        done = dict(model.generate_batch(prompts, options, n_parallel=8))
    failed = [outcome for outcome in done.values() if isinstance(outcome, Exception)]
    if failed:
        raise failed[0]
    return [(done[index].text, done[index].steps) for index in range(len(prompts))]


def percent(values: Sequence[int]) -> str:
    """Return the mean and its standard error, in percent."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return f"{100 * mean:.1f}% ± {100 * (variance / len(values)) ** 0.5:.1f}"


def cell(
    name: str, right: list[bool], answers: list[Answer], other: list[bool] | None, seconds: float
) -> str:
    """Return the fraction of puzzles solved and the mean number of steps, as a cell of the table.

    right: 1 for each puzzle that was solved, else 0. other: the same of transformers.
    """
    text = f"{percent(right)} ({sum(n for _, n in answers) / len(answers):.1f})"
    if other is not None:
        text += f", {percent([one - two for one, two in zip(right, other, strict=True)])}".replace(
            "%", " points"
        )
    print(f"{name}: {text}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora", type=Path, help="adapter; default: the one in the package")
    parser.add_argument("--transformers", action="store_true", help="evaluate with transformers and PEFT")
    parser.add_argument("--types", nargs="*", default=[], help="convert the checkpoint to these types")
    parser.add_argument("--number", type=int, default=500, help="number of puzzles")
    parser.add_argument("--only-after", action="store_true", help="leave out the model without adapter")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    adapter = arguments.lora or upright.adapter_path()
    puzzles = [puzzle for puzzle, _ in upright.held_out_puzzles(arguments.number)]
    messages = [tasks.sudoku_prompt(puzzle) for puzzle in puzzles]
    adapters = [adapter] if arguments.only_after else [None, adapter]
    print("| solved (mean steps) |" + " without adapter |" * (len(adapters) - 1) + " with adapter |")
    print("|---|" + "---|" * len(adapters))
    reference: dict[Path | None, list[bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ["transformers"] * arguments.transformers + arguments.types:
            name = "transformers, float32" if kind == "transformers" else f"pydiffusion, {kind}"
            path = Path(folder) / f"demo-{kind}.gguf"
            if kind != "transformers":
                from pydiffusion.convert import convert

                convert(checkpoint_path(), path, type=kind)
            cells = []
            for one in adapters:
                start = time.monotonic()
                if kind == "transformers":
                    answers = transformers_answers(messages, one, arguments.seed)
                else:
                    answers = gguf_answers(path, messages, one, arguments.seed)
                right = [
                    upright.check(puzzle, text) for puzzle, (text, _) in zip(puzzles, answers, strict=True)
                ]
                seconds = time.monotonic() - start
                label = f"{name}, {'without' if one is None else 'with'} adapter"
                cells.append(cell(label, right, answers, reference.get(one), seconds))
                if kind == "transformers":
                    reference[one] = right
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
