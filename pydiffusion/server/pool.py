"""Sessions kept for their caches: a request gets the one that already holds most of its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pydiffusion.errors import InsufficientMemoryError
from pydiffusion.generation.token_ids import common_prefix

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session


class SessionPool:
    """Up to ``size_limit`` sessions, made when needed. For one thread."""

    def __init__(self, model: DiffusionModel, size_limit: int) -> None:
        self._model = model
        self.size_limit = size_limit
        self.size = 0
        self._idle: list[Session] = []  # the one used longest ago first

    def take(self, prompt: list[int]) -> Session:
        """A session for these tokens; ``give_back`` it. At most ``size_limit`` may be out.

        The idle one that shares the longest beginning with them; a new one, while there may be more, rather
        than have most of what another conversation left thrown away. Raises InsufficientMemoryError where
        none is idle and there is no room for another.
        """
        wanted = np.asarray(prompt, dtype=np.int32)
        shared = [common_prefix(session.tokens, wanted) for session in self._idle]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is not None and 2 * shared[best] >= self._idle[best].n_past:
            return self._idle.pop(best)
        if self.size < self.size_limit:
            try:
                session = self._model.new_session()
            except InsufficientMemoryError:
                if best is None:
                    raise
                self.size_limit = self.size  # as many as there is room for
            else:
                self.size += 1
                return session
        assert best is not None  # fewer than size_limit are out
        # Where none has anything worth keeping for this prompt, the oldest goes.
        return self._idle.pop(best if shared[best] > len(prompt) // 2 else 0)

    def clear(self) -> None:
        """Let go of the idle sessions."""
        self.size -= len(self._idle)
        self._idle.clear()

    def give_back(self, session: Session) -> None:
        self._idle.append(session)
