"""Rollouts: examples that advance by one sampler step per training step."""

from __future__ import annotations

import torch

from .data import Batch, Examples
from .model import CANVAS_LENGTH

STEPS = 48
ENTROPY_BOUND = 0.1
T_MIN, T_MAX = 0.4, 0.8


class Rollouts:
    """Rows of the batch that stay until solved, so that the model trains on the inputs it sees in generation.

    Each row starts with a canvas of noise. After every training step, its logits from that step advance it by
    the reference's rule: divided by the step's temperature, they become the next self-conditioning, and the
    entropy-bound sampler computes the next canvas. A row is replaced by a new example once its draft is
    correct or after `patience` steps, so hard examples stay longer than easy ones.
    """

    def __init__(
        self, examples: Examples, n_sudoku: int, n_text: int, vocab_size: int, patience: int = 24
    ) -> None:
        self.examples = examples
        self.n_sudoku = n_sudoku
        self.n_rows = n_sudoku + n_text
        self.vocab_size = vocab_size
        self.patience = patience
        self.batch = examples.batch(n_sudoku, n_text)
        self.canvas = self._noise(self.n_rows)
        self.conditioning = torch.zeros(self.n_rows, CANVAS_LENGTH, vocab_size)
        self.n_steps = torch.zeros(self.n_rows, dtype=torch.int64)

    def _noise(self, n: int) -> torch.Tensor:
        return torch.randint(0, self.vocab_size, (n, CANVAS_LENGTH))

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Canvases, self-conditioning logits, and which rows have such logits (all but new ones)."""
        return self.canvas, self.conditioning, self.n_steps > 0

    @torch.no_grad()
    def advance(self, logits: torch.Tensor) -> None:
        """Advance all rows by the logits (n_rows, CANVAS_LENGTH, vocabulary) computed from `state`."""
        remaining = (STEPS - self.n_steps).float()[:, None, None]
        scaled = logits / (T_MIN + (T_MAX - T_MIN) * remaining / STEPS)
        log_probabilities = torch.log_softmax(scaled, dim=-1)
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities).sum(-1)
        sampled = torch.multinomial(probabilities.flatten(0, 1), 1).view(self.canvas.shape)
        ascending, order = torch.sort(entropy, dim=-1)
        chosen = torch.cumsum(ascending, dim=-1) - ascending <= ENTROPY_BOUND
        accepted = torch.zeros_like(chosen).scatter(1, order, chosen)
        self.canvas = torch.where(accepted, sampled, self._noise(self.n_rows))
        self.conditioning = scaled
        self.n_steps += 1
        solved = (logits.argmax(-1) == self.batch.target).all(-1)
        self._replace(solved | (self.n_steps >= self.patience))

    def _replace(self, finished: torch.Tensor) -> None:
        rows = finished.nonzero().flatten()
        if len(rows) == 0:
            return
        n_sudoku = int((rows < self.n_sudoku).sum())
        fresh = self.examples.batch(n_sudoku, len(rows) - n_sudoku)
        for name in Batch.__dataclass_fields__:
            getattr(self.batch, name)[rows] = getattr(fresh, name)
        self.canvas[rows] = self._noise(len(rows))
        self.n_steps[rows] = 0


def joined(fresh: Batch, running: Batch) -> Batch:
    """Concatenate two batches, rollouts last."""
    names = Batch.__dataclass_fields__
    return Batch(*(torch.cat([getattr(fresh, name), getattr(running, name)]) for name in names))
