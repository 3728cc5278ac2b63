"""Training batches for the demo model: token ids of `pydiffusion.demo` tasks."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from pydiffusion.demo import sudoku, tasks

from .model import CANVAS_LENGTH, EOS_IDS
from .tokenizer import chat_prompt

PAD_ID = 0
END_ID = EOS_IDS[1]
PREFIX_LENGTH = 52
"""Length of a sudoku prompt; other prompts are padded to it."""

TEXT_TASKS = {"sort": 5, "reverse": 1, "add": 4, "json": 2, "count": 2}
"""The other tasks with their sampling weights: harder tasks are more frequent."""


@dataclass
class Batch:
    """A batch of training examples.

    Attributes:
        prefix: (n, length) int64, prompt and committed canvases, right-padded.
        prefix_length: (n,) int64, length of each row of `prefix` without padding.
        target: (n, CANVAS_LENGTH) int64, the correct canvas.
        is_padding: (n, CANVAS_LENGTH) bool, positions of `target` after the end marker.
    """

    prefix: torch.Tensor
    prefix_length: torch.Tensor
    target: torch.Tensor
    is_padding: torch.Tensor


def make_pool(size: int, seed: int) -> list[tuple[str, str]]:
    """Generate (puzzle, solution) pairs with as few as 12 givens, none of them held out."""
    rng = random.Random(seed)
    pool = []
    while len(pool) < size:
        solution = sudoku.draw_grid(rng)
        if not sudoku.is_held_out(solution):
            pool.append((sudoku.thin_out(solution, sudoku.MIN_GIVENS, rng), solution))
    return pool


class Examples:
    """Generates training batches, deterministic for a seed and sequence of calls."""

    def __init__(self, tokenizer: Tokenizer, pool: list[tuple[str, str]], seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.long_examples: dict[int, list[tuple[list[int], list[int]]]] = {}
        self.solutions = np.array([[int(cell) for cell in solution] for _, solution in pool], dtype=np.int64)
        self.givens = np.array([[cell != "." for cell in puzzle] for puzzle, _ in pool])
        prompt = self._encode(chat_prompt(tasks.sudoku_prompt("." * sudoku.N_CELLS)))
        if len(prompt) != PREFIX_LENGTH:
            raise ValueError(f"a sudoku prompt has {len(prompt)} tokens, expected {PREFIX_LENGTH}")
        self.sudoku_prompt = np.array(prompt)
        self.cell_ids = np.array([tokenizer.token_to_id(cell) for cell in ".123456"])
        self.prompt_cells = np.flatnonzero(self.sudoku_prompt == self.cell_ids[0])
        grid = self._encode(sudoku.as_rows("1" * sudoku.N_CELLS))
        self.sudoku_canvas = np.array(self._canvases(grid)[0])
        self.canvas_cells = np.flatnonzero(self.sudoku_canvas == self.cell_ids[1])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @staticmethod
    def _canvases(answer: list[int]) -> list[list[int]]:
        """Split an answer and its end marker into canvases, the last one padded."""
        ids = [*answer, END_ID]
        ids += [PAD_ID] * (-len(ids) % CANVAS_LENGTH)
        return [ids[start : start + CANVAS_LENGTH] for start in range(0, len(ids), CANVAS_LENGTH)]

    def _sudoku_row(self) -> tuple[np.ndarray, np.ndarray]:
        """Augment a puzzle of the pool: rename digits, permute rows and columns, add givens."""
        rng = self.rng
        while True:
            index = rng.randrange(len(self.solutions))
            rows = [2 * band + row for band in rng.sample(range(3), 3) for row in rng.sample(range(2), 2)]
            columns = [
                3 * stack + column for stack in rng.sample(range(2), 2) for column in rng.sample(range(3), 3)
            ]
            order = (np.array(rows)[:, None] * sudoku.SIZE + np.array(columns)).ravel()
            names = np.array([0, *rng.sample(range(1, 7), 6)])
            solution = names[self.solutions[index][order]]
            if not sudoku.is_held_out("".join(map(str, solution))):
                break
        givens = self.givens[index][order]
        wanted = rng.randint(sudoku.MIN_GIVENS, 14 if rng.random() < 0.75 else sudoku.MAX_GIVENS)
        empty = np.flatnonzero(~givens).tolist()
        givens[rng.sample(empty, max(0, wanted - int(givens.sum())))] = True
        prompt, canvas = self.sudoku_prompt.copy(), self.sudoku_canvas.copy()
        prompt[self.prompt_cells] = self.cell_ids[solution * givens]
        canvas[self.canvas_cells] = self.cell_ids[solution]
        return prompt, canvas

    def _text_row(self) -> tuple[list[int], list[int]]:
        """Return the prompt and first canvas of a text example."""
        example = tasks.generate(
            self.rng.choices(list(TEXT_TASKS), list(TEXT_TASKS.values()))[0], self.rng, held_out=False
        )
        return self._encode(chat_prompt(example.prompt)), self._canvases(self._encode(example.answer))[0]

    def batch(self, n_sudoku: int, n_text: int) -> Batch:
        """Return `n_sudoku` puzzles and `n_text` other examples, with prefixes of PREFIX_LENGTH."""
        rows = [self._sudoku_row() for _ in range(n_sudoku)] + [self._text_row() for _ in range(n_text)]
        return _stack(rows, PREFIX_LENGTH)

    def long_batch(self, size: int) -> Batch:
        """Return later canvases of long answers, previous ones in the prefix; prefixes have equal length."""
        while True:
            example = tasks.generate("count", self.rng, held_out=False)
            prefix, canvases = (
                self._encode(chat_prompt(example.prompt)),
                self._canvases(self._encode(example.answer)),
            )
            for index in range(1, len(canvases)):
                row = ([*prefix, *itertools.chain(*canvases[:index])], canvases[index])
                ready = self.long_examples.setdefault(len(row[0]), [])
                ready.append(row)
                if len(ready) == size:
                    del self.long_examples[len(row[0])]
                    return _stack(ready, len(row[0]))


def _stack(rows: list, prefix_length: int) -> Batch:
    prefix = np.full((len(rows), prefix_length), PAD_ID, dtype=np.int64)
    lengths = np.array([len(row[0]) for row in rows])
    for index, row in enumerate(rows):
        prefix[index, : lengths[index]] = row[0]
    target = np.array([row[1] for row in rows], dtype=np.int64)
    return Batch(*map(torch.from_numpy, (prefix, lengths, target, target == PAD_ID)))
