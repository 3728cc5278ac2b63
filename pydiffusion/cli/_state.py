"""Files that chats leave in the user's state folder: typed history and conversations."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydiffusion._util import atomic
from pydiffusion.chat.image_parts import is_image

from ._images import text_of

Message = dict[str, Any]  # content: a text, or parts
_MAX_HISTORY = 1000


def state_folder() -> Path:
    """``$XDG_STATE_HOME/pydiffusion``, or its default."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(base) / "pydiffusion"


@contextlib.contextmanager
def input_history() -> Iterator[None]:
    """Input history of the terminal, from earlier chats too; pasted text arrives whole, if the terminal marks
    it.
    """
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off for its own prompt
    file = state_folder() / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_MAX_HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)


@dataclass(frozen=True)
class SavedChat:
    """A conversation in the state folder. modified: seconds since the epoch."""

    path: Path
    messages: list[Message]
    modified: float

    def line(self) -> str:
        """Date, length and first message."""
        asked = [text_of(message["content"]) for message in self.messages if message["role"] == "user"]
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.modified))
        first = " ".join(asked[0].split()) if asked else ""
        shown = first if len(first) <= 50 else f"{first[:50]}..."
        return f"{date}, {len(asked)} {'message' if len(asked) == 1 else 'messages'}: {shown}"


def chats_folder() -> Path:
    """Where conversations are saved by themselves."""
    return state_folder() / "chats"


def new_chat_file() -> Path:
    """Path for a conversation that begins now."""
    return chats_folder() / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{secrets.token_hex(3)}.json"


def saved_chats(limit: int = 20) -> list[SavedChat]:
    """The last conversations, newest first; other files are passed over."""
    found: list[SavedChat] = []
    dated = []
    for path in chats_folder().glob("*.json"):
        with contextlib.suppress(OSError):
            dated.append((path.stat().st_mtime, path))
    for modified, path in sorted(dated, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            found.append(SavedChat(path, read_messages(path), modified))
        if len(found) == limit:
            break
    return found


def read_messages(path: Path) -> list[Message]:
    """The messages of a saved conversation. Raises ValueError for another file."""
    read: Any = json.loads(path.read_text("utf-8"))
    messages = read.get("messages") if isinstance(read, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(f"{path} is not a saved chat")
    return messages


def write_messages(path: Path, messages: Sequence[Message], *, private: bool = False) -> None:
    """Write a conversation atomically. private: for its owner only, in a folder that is made.

    Raises PyDiffusionError.
    """
    if private:
        with atomic.explaining(path, "can't be written"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=1) + "\n"
    with atomic.replacing(path) as new:
        if private and hasattr(os, "fchmod"):
            os.fchmod(new.file.fileno(), 0o600)
        new.write(text.encode())


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("role") not in ("system", "user", "assistant"):
        return False
    content = value.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))


def _is_part(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("text"), str) if value.get("type") == "text" else is_image(value)
