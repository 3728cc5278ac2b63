"""Evaluation of a model on the demo tasks with batched `generate` of transformers."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import DiffusionGemmaForBlockDiffusion

from pydiffusion.demo import sudoku, tasks

from .tokenizer import chat_prompt


@dataclass
class Score:
    """Fraction of correct answers and mean number of denoising steps per prompt."""

    share: float
    steps: float
    n: int

    def __str__(self) -> str:
        return f"{self.share:.3f} of {self.n}, {self.steps:.1f} steps"


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: Tokenizer, messages: list[str], max_new_tokens: int, steps: int | None = None
) -> list[tuple[str, float]]:
    """Generate (text, steps) for each message; batches prompts of equal length."""
    ids = [tokenizer.encode(chat_prompt(message), add_special_tokens=False).ids for message in messages]
    by_length = defaultdict(list)
    for index, row in enumerate(ids):
        by_length[len(row)].append(index)
    result: list[tuple[str, float]] = [("", 0.0)] * len(messages)
    extra = {} if steps is None else {"max_denoising_steps": steps}
    ends = set(model.generation_config.eos_token_id)
    for length, indices in by_length.items():
        prompt = torch.tensor([ids[index] for index in indices])
        output = model.generate(prompt, max_new_tokens=max_new_tokens, **extra)
        for index, row, speed in zip(
            indices, output.sequences[:, length:].tolist(), output.tokens_per_forward.tolist(), strict=True
        ):
            n_counted = sum(token != 0 for token in row)
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            result[index] = (tokenizer.decode(row[:end]), n_counted / speed if speed else 0.0)
    return result


def sudoku_score(
    model: nn.Module,
    tokenizer: Tokenizer,
    rng: random.Random,
    n: int,
    puzzles: list[tuple[str, str]] | None = None,
    steps: int | None = None,
) -> Score:
    """Return the score on `puzzles`, or on `n` new held-out ones."""
    if puzzles is None:
        puzzles = []
        while len(puzzles) < n:
            pair = sudoku.draw_puzzle(rng, sudoku.MIN_GIVENS + len(puzzles) % 13)
            if sudoku.is_held_out(pair[1]):
                puzzles.append(pair)
    prompts = [tasks.sudoku_prompt(puzzle) for puzzle, _ in puzzles]
    return score("sudoku", prompts, answers(model, tokenizer, prompts, model.config.canvas_length, steps))


def text_scores(model: nn.Module, tokenizer: Tokenizer, rng: random.Random, n: int) -> dict[str, Score]:
    """Return the scores on `n` held-out examples of every other task."""
    scores = {}
    for name in tasks.TASKS:
        if name != "sudoku":
            prompts = [tasks.generate(name, rng, held_out=True).prompt for _ in range(n)]
            scores[name] = score(
                name, prompts, answers(model, tokenizer, prompts, 3 * model.config.canvas_length)
            )
    return scores


def score(task: str, prompts: list[str], generated: list[tuple[str, float]]) -> Score:
    """Check all answers and return the score."""
    right = sum(tasks.check(task, prompt, text) for prompt, (text, _) in zip(prompts, generated, strict=True))
    return Score(right / len(prompts), sum(steps for _, steps in generated) / len(prompts), len(prompts))


def load_checkpoint(folder: Path) -> tuple[nn.Module, Tokenizer]:
    """Load a checkpoint in transformers, float32 and eager; raises if a text model's weight is missing."""
    model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    missing = [name for name in report["missing_keys"] if "vision" not in name]
    if missing or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"{folder} does not fit the model: missing {missing}, unexpected {report['unexpected_keys']}"
        )
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
