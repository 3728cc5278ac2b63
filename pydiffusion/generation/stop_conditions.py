"""Stop conditions of Python's side: the thinking budget and the repetition check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pydiffusion.options import ResolvedOptions

from .repetition import loop_start
from .thinking_budget import ThoughtBudget
from .token_ids import prompt_end

if TYPE_CHECKING:
    from pydiffusion.session import Session


class StopConditions:
    """Applies both to the canvases of one generation, as far as its options ask for them."""

    def __init__(self, session: Session, options: ResolvedOptions) -> None:
        """session: with the prompt as its tokens. Raises as ``ThoughtBudget``."""
        self._native = session.native
        self._budget: ThoughtBudget | None = None
        if options.thinking_budget is not None:
            end = prompt_end(session.tokens).tolist()
            self._budget = ThoughtBudget(session.model.tokenizer, options.thinking_budget, end)
        self._past: np.ndarray | None = np.empty(0, np.int32) if options.stop_on_repetition else None

    def apply(self, tokens: np.ndarray, finish: str) -> tuple[np.ndarray, str]:
        """Truncate a finished canvas, in the session too.

        tokens: int32 (n,).  finish: the reason to end after them, empty to continue. Returns both as they are
        then.
        """
        if self._budget is not None and (cut := self._budget.cut(tokens.tolist())) is not None:
            tokens = np.asarray(cut, dtype=np.int32)
            finish = self._native.amend(tokens)
        if self._past is not None:
            self._past = np.concatenate([self._past, tokens])
            if not finish and (start := loop_start(self._past)) is not None:
                n_before = len(self._past) - len(tokens)
                return tokens[: max(0, start - n_before)], "repetition"
        return tokens, finish
