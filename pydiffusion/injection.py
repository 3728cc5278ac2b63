"""Keeps what people write from steering the model: markers spelled out in messages stay characters.

A chat template joins messages and control tokens to one text, in which ``<|turn>`` of a user looks like the
template's own. So each marker in what goes into the template is replaced by a placeholder, and encoded as
plain characters where the placeholder comes out. Texts without markers are encoded as they always were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .chat_output import MARKERS

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

# Around the number of a placeholder: code points that are no characters and stand in no sensible text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_MAX_DEPTH = 64


class Neutralizer:
    """For one prompt: ``hide`` what goes into the template, then ``tokenize`` what comes out of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pattern = tokenizer.marker_pattern
        self._hidden: list[str] = []

    def hide(self, value: Any, depth: int = 0) -> Any:
        """The same value, its strings without markers."""
        if isinstance(value, str):
            return self._pattern.sub(self._placeholder, value)
        if depth > _MAX_DEPTH:
            raise ValueError("messages or tools are nested too deeply")
        if isinstance(value, Mapping):
            return {self.hide(k, depth + 1): self.hide(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(entry, depth + 1) for entry in value]
        return value

    def _placeholder(self, match: re.Match[str]) -> str:
        self._hidden.append(match.group())
        return f"{_OPEN}{len(self._hidden) - 1}{_CLOSE}"

    def tokenize(self, text: str) -> list[int]:
        """Token ids; only the template's own markers become what they stand for."""
        ids: list[int] = []
        for i, part in enumerate(_PLACEHOLDER.split(text)):
            if i % 2 == 0:
                ids += self._tokenizer.tokenize(part, add_bos=False, parse_special=True)
                continue
            # In two halves, for a file may type a marker as visible, and then it is recognised everywhere.
            marker = self._hidden[int(part)] if int(part) < len(self._hidden) else ""
            for half in (marker[:1], marker[1:]):
                ids += self._tokenizer.tokenize(half, add_bos=False)
        return ids


def marker_pattern(control_tokens: list[str]) -> re.Pattern[str]:
    """What may not come from a message: control tokens, the markers that answers are parsed by, and ours."""
    texts = {*control_tokens, *MARKERS, _OPEN, _CLOSE} - {""}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=lambda t: (-len(t), t))))
