"""Thinking budget: limits the reasoning tokens of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from pydiffusion.errors import OptionError
from pydiffusion.tokenizer import Tokenizer


def can_think(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the markers of reasoning blocks."""
    return _reasoning_ids(tokenizer) is not None


def _reasoning_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Ids of the markers around reasoning, if the format has them and the vocabulary too."""
    markers = tokenizer.chat_format.reasoning
    if markers is None:
        return None
    begin, end = map(tokenizer.token_id, markers)
    return None if begin is None or end is None else (begin, end)


class ThoughtBudget:
    """Counts the reasoning tokens over an answer's canvases, without markers and channel name."""

    def __init__(self, tokenizer: Tokenizer, budget: int, prompt_end: Sequence[int]) -> None:
        """prompt_end: the last tokens of the prompt, which may leave a reasoning block open.

        Raises OptionError if the vocabulary has no reasoning markers.
        """
        ids = _reasoning_ids(tokenizer)
        if ids is None:
            raise OptionError(
                "thinking_budget", "thinking_budget needs the markers of thinking, and this file has none"
            )
        self._begin, self._end = ids
        chat_format = tokenizer.chat_format
        others = map(tokenizer.token_id, (*(chat_format.call or ())[:1], *chat_format.ends))
        self._ends = {self._end, *(token for token in others if token is not None)}
        names = [f"{name}\n" for name in chat_format.channel_names or ()] or ["", ""]
        self._thought_name, self._answer_name = (tokenizer.tokenize(name, add_bos=False) for name in names)
        self._left = budget
        self._block: list[int] | None = None  # tokens since the opening marker
        for token in prompt_end:
            self._follow(token)
        if self._block is not None:
            self._left += self._n_counted()  # those of the prompt

    def cut(self, tokens: Sequence[int]) -> list[int] | None:
        """Count a canvas. Returns None within the budget, else the canvas truncated, its reasoning closed."""
        for i, token in enumerate(tokens):
            self._follow(token)
            if self._block is not None and self._n_counted() > self._left:
                self._close()
                return [*tokens[:i], self._end]
        return None

    def _follow(self, token: int) -> None:
        if token in self._ends:
            self._close()
        elif token == self._begin:
            self._close()
            self._block = []
        elif self._block is not None:
            self._block.append(token)
            if self._block == self._answer_name:  # an answer in its own channel
                self._block = None

    def _close(self) -> None:
        if self._block is not None:
            self._left = max(0, self._left - self._n_counted())
            self._block = None

    def _n_counted(self) -> int:
        assert self._block is not None
        name, n = self._thought_name, len(self._block)
        if self._block == self._answer_name[:n]:  # it may become that
            return 0
        return max(0, n - len(name)) if self._block[: len(name)] == name[:n] else n
