"""Texts that steer a chat model and are no text: Gemma 4's markers, and where they are in a string."""

from __future__ import annotations

import re
from collections.abc import Iterable

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'
RESPONSE, TURN, TURN_END = "<|tool_response>", "<|turn>", "<turn|>"
NAMES = ("thought", "final")  # of channels: for thinking, for the answer

# All that steers and is no text. A file may type them as control tokens or as visible ones.
MARKERS = (
    CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE, RESPONSE, "<tool_response|>", TURN, TURN_END,
    "<|tool>", "<tool|>", "<|think|>",
)  # fmt: skip

# Around the number of a placeholder: code points that are no characters and stand in no sensible text.
PLACEHOLDER_OPEN, PLACEHOLDER_CLOSE = "\ufdd0", "\ufdd1"
# As a template writes them that has JSON in plain ASCII.
_IN_ASCII = ("\\ufdd0", "\\ufdd1")


class MarkerSet:
    """What may not come from a message: control tokens, the markers that answers are parsed by, and ours."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        texts = {*control_tokens, *MARKERS, PLACEHOLDER_OPEN, PLACEHOLDER_CLOSE, *_IN_ASCII} - {""}
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self.longest = max(map(len, texts))

    def is_beginning(self, text: str) -> bool:
        """Whether it is the beginning of a marker, and no marker itself."""
        return text in self._beginnings and not self.pattern.fullmatch(text)

    def beginning_at_end(self, text: str) -> str:
        """What a marker could begin with at the end of the text, spaces after it aside; "" for nothing."""
        text = text.rstrip()
        for n in range(min(self.longest - 1, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return text[-n:]
        return ""
