"""``pydiffusion chat``: chat on the terminal, or line by line through a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _open, _options
from ._conversation import CommandError, Conversation
from ._text import say

_HELP = """/steps N     maximum number of denoising steps per canvas; without N the file's
/seed N      random seed of the answers; without N a new one for each
/retry       answer the last message again
/edit TEXT   replace the last answer; the model fills a <|hole|> in it
/save FILE   save the conversation; /load FILE loads it
/reset       start a new conversation
/exit        end, like Ctrl-D; Ctrl-C stops an answer
A line that ends in \\ continues on the next; lines between two lines of \"\"\" are one message."""
_SHORT_HELP = "/help lists the commands, Ctrl-D ends, Ctrl-C stops an answer"
_BLOCK = '"""'
_MAX_HISTORY = 1000


@_options.takes(choices=_options.TEXT, runtime=_options.CHAT_RUNTIME)
def command(
    model: _options.ModelPath,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    *,
    choices: dict[str, Any],
    runtime: dict[str, Any],
) -> None:
    """Chat with a model. /help lists its commands, Ctrl-D ends, Ctrl-C stops an answer."""
    _open.make_options(**choices)
    opened = _open.open_model(model, runtime)
    opened.check_chat_template()
    conversation = Conversation(opened, _open.make_options(opened, **choices), system)
    if sys.stdin.isatty():
        say(_SHORT_HELP)
    with _history():
        while (message := _read_message()) is not None:
            if message in ("/exit", "/quit"):
                return
            try:
                _obey(conversation, message)
            except (CommandError, ValueError) as error:
                say(str(error))


def _obey(conversation: Conversation, message: str) -> None:
    """Execute a slash command, or answer a message."""
    name, _, rest = message.partition(" ")
    rest = rest.strip()
    if not message.startswith("/"):
        if message:
            conversation.say(message)
    elif name == "/reset":
        conversation.reset()
        say("forgotten")
    elif name == "/help":
        print(_HELP, file=sys.stderr, flush=True)
    elif name in ("/steps", "/seed"):
        say(conversation.set_option(name[1:], rest))
    elif name == "/retry":
        conversation.retry()
    elif name == "/edit":
        conversation.edit(rest)
    elif name == "/save":
        say(conversation.save(rest))
    elif name == "/load":
        say(conversation.load(rest))
    else:
        raise CommandError(f"{name} is not a command; /help lists them")


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Persistent input history, on a terminal."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "pydiffusion"
    file = folder / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_MAX_HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)


def _read_message() -> str | None:
    """Read a message of one or several lines; None at the end of the input."""
    line = _read_line("> ")
    if line is None:
        return None
    if line.strip() == _BLOCK:
        lines = []
        while (line := _read_line(". ")) is not None and line.strip() != _BLOCK:
            lines.append(line)
        return "\n".join(lines).strip()
    message = line
    while message.endswith("\\"):
        more = _read_line(". ")
        message = message[:-1] + "\n" + (more or "")
        if more is None:
            break
    return message.strip()


def _read_line(mark: str) -> str | None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input(mark)
        except EOFError:
            print()
            return None
    if sys.stdin.isatty():  # stdout is redirected: keep the prompt out of it
        print(mark, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
