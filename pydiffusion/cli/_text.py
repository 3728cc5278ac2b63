"""Make untrusted text safe to print on a terminal."""

from __future__ import annotations

import re
import sys
import unicodedata

# Escape sequences: CSI, the string types (OSC, DCS, ...), two-byte ones.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
# Bidirectional controls, by which text can disguise itself as other text.
_REORDERING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """Remove escape sequences and control characters, except line breaks and tabs."""
    text = _ESCAPES.sub("", text)
    return "".join(
        character
        for character in text
        if character in "\n\t"
        or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _REORDERING)
    )


def one_line(text: str) -> str:
    """Make the text printable, on one line."""
    return " ".join(printable(text).split())


def say(message: str) -> None:
    """Print a line to stderr."""
    print(one_line(message), file=sys.stderr, flush=True)
