"""Gemma 4's chat markers, and a pattern that finds control tokens and markers in text."""

from __future__ import annotations

import re
from collections.abc import Iterable

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'
RESPONSE, TURN, TURN_END = "<|tool_response>", "<|turn>", "<turn|>"
CHANNEL_NAMES = ("thought", "final")  # for reasoning, for the answer

# All markers. A file may type them as control tokens or as visible ones.
MARKERS = (
    CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE, RESPONSE, "<tool_response|>", TURN, TURN_END,
    "<|tool>", "<tool|>", "<|think|>",
)  # fmt: skip

# Delimiters of placeholders (see chat/sanitize.py): noncharacters, which don't occur in real text.
PLACEHOLDER_OPEN, PLACEHOLDER_CLOSE = "\ufdd0", "\ufdd1"
# The delimiters as templates that write ASCII-only JSON escape them.
_IN_ASCII = ("\\ufdd0", "\\ufdd1")


class MarkerSet:
    """Texts that must not come from a message: control tokens, markers, placeholder delimiters."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        texts = {*control_tokens, *MARKERS, PLACEHOLDER_OPEN, PLACEHOLDER_CLOSE, *_IN_ASCII} - {""}
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self.longest = max(map(len, texts))

    def is_beginning(self, text: str) -> bool:
        """Whether the text is a proper prefix of a marker and not a marker itself."""
        return text in self._beginnings and not self.pattern.fullmatch(text)

    def beginning_at_end(self, text: str) -> str:
        """The longest suffix, ignoring trailing whitespace, that is a prefix of a marker; "" if none."""
        text = text.rstrip()
        for n in range(min(self.longest - 1, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return text[-n:]
        return ""
