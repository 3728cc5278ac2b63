"""Texts that must not come from a message, and a pattern that finds them."""

from __future__ import annotations

from collections.abc import Iterable

from pydiffusion.chat.formats.chat_format import any_of

# Delimiters of placeholders (see chat/sanitize.py): noncharacters, which don't occur in real text.
PLACEHOLDER_OPEN, PLACEHOLDER_CLOSE = "\ufdd0", "\ufdd1"
# The delimiters as templates that write ASCII-only JSON escape them.
_IN_ASCII = ("\\ufdd0", "\\ufdd1")


class MarkerSet:
    """Texts that must not come from a message: markers and the delimiters of placeholders."""

    def __init__(self, markers: Iterable[str]) -> None:
        """markers: control tokens, and the chat format's markers."""
        texts = {*markers, PLACEHOLDER_OPEN, PLACEHOLDER_CLOSE, *_IN_ASCII} - {""}
        self.pattern = any_of(texts)
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
