"""Text from models and files, made fit for a terminal."""

from __future__ import annotations

import re
import unicodedata

# Sequences that move the cursor, colour, or set a terminal's title: CSI, the string types (OSC, DCS, ...),
# two-byte ones.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
# Marks that reorder what is displayed, by which text can pose as other text.
_REORDERING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """The text without anything that a terminal would obey; line breaks and tabs stay."""
    text = _ESCAPES.sub("", text)
    return "".join(
        character
        for character in text
        if character in "\n\t"
        or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _REORDERING)
    )


def one_line(text: str) -> str:
    """The text on one line, printable."""
    return " ".join(printable(text).split())


def count(number: float, unit: str = "") -> str:
    """A number with its thousands abbreviated: 25.2 G, 438 M, 12 k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()
