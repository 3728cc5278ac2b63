"""``pydiffusion chat``: chat on the terminal, or line by line through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _open, _options
from ._chat_commands import ENDS, obey
from ._chat_input import Typed, read_message
from ._conversation import CommandError, Conversation
from ._images import image_parts
from ._input import check_encodable
from ._state import chats_folder, input_history, saved_chats
from ._text import say

_SHORT_HELP = "/help lists the commands, Ctrl-D ends, Ctrl-C stops an answer"


@_options.takes(choices=_options.TEXT, runtime=_options.IMAGE_RUNTIME)
def command(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="As -m.", show_default=False)
    ] = None,
    model: _options.ModelOrFirst = None,
    system: _options.System = None,
    continued: Annotated[
        bool, typer.Option("--continue", help="Go on with the last conversation that was saved.")
    ] = False,
    save: Annotated[
        bool,
        typer.Option(
            "--save/--no-save",
            help="Keep conversations of a terminal in the user's state folder, after each answer.",
        ),
    ] = True,
    image: _options.Images = None,
    *,
    choices: dict[str, Any],
    temperature: _options.Temperature = None,
    runtime: dict[str, Any],
) -> None:
    """Chat with a model. /help lists its commands, Ctrl-D ends, Ctrl-C stops an answer."""
    path, left = _open.model_and_rest(model, words or [], first=model is None)
    if left:
        raise typer.BadParameter(
            f"{left[0]!r}: chat asks for messages; for one answer: pydiffusion run MODEL TEXT"
        )
    choices["temperature"] = temperature
    chat(path, system, choices, runtime, continued=continued, save=save, images=image)


def chat(
    path: Path,
    system: str | None,
    choices: Mapping[str, Any],
    runtime: Mapping[str, Any],
    *,
    continued: bool = False,
    save: bool = True,
    images: Sequence[Path] | None = None,
) -> None:
    """Load the model and chat until the input ends. choices: fields of GenerationOptions, and
    temperature.  images: files that the first message is about.
    """
    _open.check_options(choices)
    check_encodable(system or "", "--system")
    last = saved_chats(1) if continued else []
    if continued and not last:
        raise ValueError(f"there is no saved conversation in {chats_folder()}")
    parts = image_parts(images)
    opened = _open.open_model(path, runtime)
    opened.check_chat_template()
    if parts:
        opened.require_vision()
    is_terminal = sys.stdin.isatty()
    conversation = Conversation(
        opened, _open.make_options(opened, **choices), system, save=save and is_terminal
    )
    for part in parts:
        conversation.attach(part)
    for saved in last:
        conversation.resume(saved)
        say(f"going on with {saved.line()}")
    if is_terminal:
        say(_SHORT_HELP)
    with input_history() if is_terminal and sys.stdout.isatty() else contextlib.nullcontext():
        try:
            _talk(conversation)
        finally:
            if conversation.is_saved:
                say("the conversation is saved; pydiffusion chat --continue goes on with it")


def _talk(conversation: Conversation) -> None:
    """Answer messages and execute commands until the input or the user ends."""
    interrupted = False
    while True:
        try:
            message = read_message()
            interrupted = False
            if message is None or (message.text in ENDS and not message.literal):
                return
            _answer(conversation, message)
        except (CommandError, ValueError) as error:  # ValueError: not UTF-8, an option
            say(str(error))
        except KeyboardInterrupt:
            if interrupted or not sys.stdin.isatty():
                raise
            interrupted = True
            say("Ctrl-C again ends the chat, as does Ctrl-D")


def _answer(conversation: Conversation, message: Typed) -> None:
    if message.text.startswith("/") and not message.literal:
        obey(conversation, message.text)
    elif message.text:
        conversation.say(message.text)
