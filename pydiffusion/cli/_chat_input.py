"""Read the messages of a chat: lines, blocks between triple quotes, pasted text."""

from __future__ import annotations

import select
import sys
from dataclasses import dataclass

from ._input import decode

_BLOCK = '"""'
# A terminal without bracketed paste delivers pasted lines at once; nobody types the next line this soon.
_PASTE_SECONDS = 0.05


@dataclass(frozen=True)
class Typed:
    """A message. literal: not a command, even if it begins with ``/``."""

    text: str
    literal: bool = False


def read_message() -> Typed | None:
    """Read a message of one or several lines; None at the end of the input.

    Raises ValueError for a line that is not UTF-8, KeyboardInterrupt for Ctrl-C.
    """
    # Lines that were typed during the answer are messages of their own.
    may_be_pasted = sys.stdin.isatty() and not _is_waiting(0.0)
    line = _read_line("> ")
    if line is None:
        return None
    if line.lstrip().startswith(_BLOCK):
        return Typed(_rest_of_block(line.lstrip().removeprefix(_BLOCK)), literal=True)
    lines = [line]
    while may_be_pasted and not line.startswith("/") and _is_waiting(_PASTE_SECONDS):
        more = _read_line(". ")
        if more is None:
            break
        lines.append(more)
    while lines[-1].endswith("\\"):
        more = _read_line(". ")
        lines[-1] = lines[-1][:-1]
        lines.append(more or "")
        if more is None:
            break
    text = "\n".join(lines).strip()
    return Typed(text, literal="\n" in text)


def _rest_of_block(text: str) -> str:
    """A message up to the closing quotes, or the end of the input."""
    while not text.rstrip().endswith(_BLOCK):
        line = _read_line(". ")
        if line is None:
            break
        text += "\n" + line
    return text.rstrip().removesuffix(_BLOCK).strip()


def _read_line(mark: str) -> str | None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input(mark)
        except EOFError:
            print()
            return None
    if sys.stdin.isatty():  # stdout is redirected: keep the prompt out of it
        print(mark, end="", file=sys.stderr, flush=True)
    if not hasattr(sys.stdin, "buffer"):
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    data = sys.stdin.buffer.readline()
    return decode(data, "a message that is left out").rstrip("\r\n") if data else None


def _is_waiting(seconds: float) -> bool:
    """Whether the terminal has input that nobody has read."""
    try:
        return bool(select.select([sys.stdin], [], [], seconds)[0])
    except (OSError, ValueError):  # Windows selects sockets only
        return False
