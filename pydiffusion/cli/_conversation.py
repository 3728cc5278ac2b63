"""State of a chat: messages, session, and the slash commands."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import _open
from ._images import Part, image_part, text_of, with_images
from ._run import figures, prefill
from ._state import Message, SavedChat, new_chat_file, read_messages, saved_chats, write_messages
from ._text import printable, say

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel, GenerationOptions

#: Options that a chat can set, by field name of GenerationOptions, and temperature.
OPTIONS: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "seed": int,
    "max_tokens": int,
    "temperature": float,
    "t_min": float,
    "t_max": float,
    "entropy_bound": float,
    "confidence_threshold": float,
    "stability_threshold": int,
    "thinking_budget": int,
    "stop": str,
}
MINUS_ONE_IS_NONE = ("seed", "max_tokens")


def _path_typed(text: str) -> str:
    """A path as typed, or as a terminal writes a file that is dropped on it: in quotes, or with blanks
    escaped.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text if Path(text).exists() else text.replace("\\ ", " ")


class CommandError(Exception):
    """A slash command that can't be executed; the chat continues."""


class Conversation:
    """Messages of a chat and the session that caches them; saved after each answer, if asked for."""

    def __init__(
        self, model: DiffusionModel, options: GenerationOptions, system: str | None, *, save: bool = False
    ) -> None:
        self._model = model
        self._options = options
        self._system = system
        self._session = model.new_session()
        self._saves = save
        self.reset()

    def reset(self) -> None:
        """Clear the messages; the cache is replaced by the next prompt."""
        self._messages: list[Message] = (
            [] if self._system is None else [{"role": "system", "content": self._system}]
        )
        self._file: Path | None = None
        self._attached: list[Part] = []  # images of the next message

    @property
    def is_saved(self) -> bool:
        """Whether ``chat --continue`` would find this conversation."""
        return self._file is not None

    def attach(self, image: Part) -> str:
        """Let the next message be about an image too; returns a message. Raises CommandError if the model
        reads no images.
        """
        from pydiffusion import PyDiffusionError

        try:
            self._model.require_vision()
        except PyDiffusionError as error:
            raise CommandError(str(error)) from None
        self._attached.append(image)
        n = len(self._attached)
        return "the next message is about " + ("this image" if n == 1 else f"{n} images")

    def attach_file(self, given: str) -> str:
        """As ``attach``, of a file; without one, forget the images attached."""
        from pydiffusion import PyDiffusionError

        if not given:
            n, self._attached = len(self._attached), []
            forgotten = f"{n} attached image{'s' if n > 1 else ''} forgotten"
            return forgotten if n else "give a file: /image FILE"
        try:
            return self.attach(image_part(Path(_path_typed(given)).expanduser()))
        except OSError as error:
            raise CommandError(f"{given}: {error.strerror or error}") from None
        except (PyDiffusionError, ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from None

    def resume(self, chat: SavedChat) -> None:
        """Go on with a saved conversation, in its file."""
        self._take(chat.messages)
        self._file = chat.path

    def set_system(self, text: str) -> str:
        """Replace the system message for what follows; returns a message. Empty text shows it."""
        if text:
            self._system = text
            self._take([message for message in self._messages if message["role"] != "system"])
        return f"system message: {self._system}" if self._system is not None else "there is no system message"

    def set_lora(self, given: str) -> str:
        """Apply other adapters in what follows, each as --lora takes it; "none" takes all off, and nothing
        lists them. Returns a message. Raises CommandError with the earlier ones left on.
        """
        from pydiffusion import PyDiffusionError

        try:
            if given:
                several = shlex.split(given, posix=os.name != "nt")  # Windows' paths have backslashes
                self._model.set_lora(_open.adapters_of([] if given == "none" else several))
        except (PyDiffusionError, ValueError, OSError, typer.BadParameter) as error:
            raise CommandError(str(error)) from None
        shown = ", ".join(f"{adapter.name}:{scale:g}" for adapter, scale in self._model.lora)
        return f"adapters: {shown or 'none'}"

    def _take(self, messages: list[Message]) -> None:
        """Take over messages; those without a system message get the chat's."""
        first = text_of(messages[0]["content"]) if messages and messages[0]["role"] == "system" else None
        if first is None and self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        self._system = first or self._system
        self._messages = messages

    def say(self, text: str) -> None:
        """Add a user message and print the answer; without an answer the message is forgotten."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"the message is not valid UTF-8 at character {error.start + 1}: it is left out"
            raise CommandError(what) from None
        self._messages.append({"role": "user", "content": with_images(text, self._attached)})
        answered = False
        try:
            answered = self._answer()
        finally:
            if not answered:
                self._messages.pop()
        if answered:
            self._attached = []
            self._autosave()

    def _autosave(self) -> None:
        from pydiffusion import PyDiffusionError

        if not self._saves:
            return
        file = self._file or new_chat_file()
        try:
            write_messages(file, self._messages, private=True)
            self._file = file
        except PyDiffusionError as error:
            self._saves = False
            say(f"pydiffusion: warning: the conversation is not saved: {error}")

    def retry(self) -> None:
        """Regenerate the last answer; the previous one is restored if the new one is empty."""
        before = self._messages.pop() if self._role_of_last() == "assistant" else None
        if self._role_of_last() != "user":
            raise CommandError("there is no message to answer again")
        if not self._answer() and before is not None:
            self._messages.append(before)
        self._autosave()

    def edit(self, text: str) -> None:
        """Replace the last answer by a text; holes in it are filled."""
        from pydiffusion.generation.infill import (
            DEFAULT_HOLE_TOKENS,
            HOLE,
            NOT_AROUND_HOLES,
            collect,
            lay_out,
            prepare,
        )

        if not text:
            raise CommandError(f"give the new answer: /edit TEXT; {HOLE} in it is filled by the model")
        if self._role_of_last() != "assistant":
            raise CommandError("there is no answer to edit")
        if "<|hole" in text:
            model, options = self._model, self._options
            layout = lay_out(model, text, DEFAULT_HOLE_TOKENS, whole=True)
            prompt = model.chat_prompt(self._messages[:-1])
            own = replace(options, **dict.fromkeys(NOT_AROUND_HOLES))
            own = prepare(model, layout, prompt, own, self._session.n_ctx)
            prefill(self._session, prompt)
            text = collect(layout, self._session.complete(own), model.tokenizer).text
            print(printable(text) if sys.stdout.isatty() else text)
        self._messages[-1] = {"role": "assistant", "content": text}
        self._autosave()

    def set_option(self, name: str, given: str) -> str:
        """Set a generation option from text, or reset it without; returns a message."""
        from pydiffusion import OptionError
        from pydiffusion.options import at_temperature

        if name not in OPTIONS:
            raise CommandError(f"{name} can't be set here; options are {', '.join(OPTIONS)}")
        convert = OPTIONS[name]
        choice: dict[str, Any] = {name: None}
        try:
            if given and not (name in MINUS_ONE_IS_NONE and given == "-1"):
                value = convert(given)
                choice = (
                    at_temperature(value, self._model.metadata) if name == "temperature" else {name: value}
                )
            elif name == "temperature":
                choice = {"t_min": None, "t_max": None}
            self._options = replace(self._options, **choice)
        except OptionError as error:
            raise CommandError(str(error)) from None
        except ValueError:
            raise CommandError(f"/{name} takes a number") from None
        if given:
            return f"{name} {given}"
        return f"{name}: {'drawn anew' if name == 'seed' else 'as the file says'}"

    def save(self, path: str) -> str:
        """Write the messages to a file atomically."""
        from pydiffusion import PyDiffusionError

        if not path:
            raise CommandError("give a file: /save FILE")
        try:
            write_messages(Path(path).expanduser(), self._messages)
        except (PyDiffusionError, RuntimeError) as error:
            raise CommandError(str(error)) from None
        return f"{len(self._messages)} messages saved in {path}"

    def load(self, given: str) -> str:
        """Load the messages of a file written by ``save``, or of a saved conversation by its number; list
        these without either.
        """
        chats = saved_chats() if not given or given.isdecimal() else []
        if not given:
            lines = [f"{i:3}  {chat.line()}" for i, chat in enumerate(chats, 1)]
            print("\n".join(printable(line) for line in lines), file=sys.stderr, flush=True)
            return "/load NUMBER goes on with one, /load FILE loads one that /save wrote"
        if given.isdecimal() and 0 < int(given) <= len(chats):
            self.resume(chats[int(given) - 1])
        else:
            try:
                self._take(read_messages(Path(given).expanduser()))
            except OSError as error:
                raise CommandError(f"{given}: {error.strerror or error}") from None
            except (ValueError, RuntimeError):
                raise CommandError(f"{given} is not a saved chat") from None
            self._file = None
        return f"{len(self._messages)} messages loaded from {given}"

    def _role_of_last(self) -> str | None:
        return self._messages[-1]["role"] if self._messages else None

    def _answer(self) -> bool:
        """Generate and print an answer; returns whether there is any. Ctrl-C stops it and keeps what was
        printed.
        """
        from pydiffusion import PyDiffusionError
        from pydiffusion.generation.completion import completion_of

        from ._display import AnswerPrinter, CanvasDisplay

        options = self._model.resolve(self._options)
        display = CanvasDisplay(self._model.tokenizer, options.eos) if sys.stderr.isatty() else None
        printer = AnswerPrinter(display)
        try:
            prompt = self._model.chat_prompt(self._messages)
            prefill(self._session, prompt)
            finished = []
            with printer:
                for event in self._session.generate_chat(options):
                    printer(event)
                    finished += [] if hasattr(event, "accepted") else [event]
            say(figures(completion_of(self._model.tokenizer, len(prompt), finished)))
        except KeyboardInterrupt:
            say("stopped")
        except PyDiffusionError as error:
            say(f"{error}; /reset starts over")
        if printer.text:
            self._messages.append({"role": "assistant", "content": printer.text})
        return bool(printer.text)
