"""Session pool with prefix caching: a request gets the session that already holds most of its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydiffusion.errors import InsufficientMemoryError
from pydiffusion.generation.image_prompt import cached_length, read_prompt

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.options import Lora
    from pydiffusion.session import Session
    from pydiffusion.vision.prompt import Prompt


class SessionPool:
    """Up to ``size_limit`` sessions, created on demand. Not thread-safe."""

    def __init__(self, model: DiffusionModel, size_limit: int) -> None:
        self._model = model
        self.size_limit = size_limit
        self.size = 0
        self._idle: list[Session] = []  # least recently used first

    def take(self, prompt: list[int] | Prompt, lora: Lora | None = None) -> Session:
        """Take a session for this prompt and these adapters (None: the model's); return it with
        ``give_back``. At most ``size_limit`` may be in use.

        Prefers the idle session with the longest common prefix, encoded under the same adapters; creates a
        new one, while allowed, rather than discard most of another conversation's cache. Raises
        InsufficientMemoryError if none is idle and memory for another one can't be allocated.
        """
        key = self._model.lora_key(lora)
        session = self._choose(prompt, key)
        if session.lora_key != key:
            session.truncate(0)  # else its tokens would be encoded anew, with these adapters
        return session

    def _choose(self, prompt: list[int] | Prompt, key: bytes) -> Session:
        wanted = read_prompt(self._model, prompt)
        shared = [cached_length(session, wanted) if session.lora_key == key else 0 for session in self._idle]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is not None and 2 * shared[best] >= self._idle[best].n_past:
            return self._idle.pop(best)
        if self.size < self.size_limit:
            try:
                session = self._model.new_session()
            except InsufficientMemoryError:
                if best is None:
                    raise
                self.size_limit = self.size  # as many as memory allows
            else:
                self.size += 1
                return session
        assert best is not None  # fewer than size_limit are in use
        # If no cache is worth keeping for this prompt, evict the least recently used.
        return self._idle.pop(best if shared[best] > len(prompt) // 2 else 0)

    def clear(self) -> None:
        """Drop the idle sessions."""
        self.size -= len(self._idle)
        self._idle.clear()

    def give_back(self, session: Session) -> None:
        self._idle.append(session)
