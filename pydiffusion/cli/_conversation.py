"""A chat's messages, its session, and what its commands do to them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _common as common
from ._text import printable
from .generate import figures, prefill

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel, GenerationOptions

Message = dict[str, str]


class CommandError(Exception):
    """A command that can't be done; the chat goes on."""


class Conversation:
    """The messages so far and the session that has them in its cache."""

    def __init__(self, model: DiffusionModel, options: GenerationOptions, system: str | None) -> None:
        self._model = model
        self._options = options
        self._system = system
        self._session = model.new_session()
        self.reset()

    def reset(self) -> None:
        """Forget the messages; the cache goes with the next prompt."""
        self._messages: list[Message] = (
            [] if self._system is None else [{"role": "system", "content": self._system}]
        )

    def say(self, text: str) -> None:
        """Take a message and print the answer to it."""
        self._messages.append({"role": "user", "content": text})
        if not self._answer():
            self._messages.pop()

    def retry(self) -> None:
        """Answer the last message anew; the answer before comes back where the new one says nothing."""
        before = self._messages.pop() if self._role_of_last() == "assistant" else None
        if self._role_of_last() != "user":
            raise CommandError("there is no message to answer again")
        if not self._answer() and before is not None:
            self._messages.append(before)

    def edit(self, text: str) -> None:
        """Put a text in place of the last answer; holes in it are filled."""
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

    def set_option(self, name: str, given: str) -> str:
        """Set ``steps`` or ``seed`` to a number, or back with no number; returns what holds now."""
        try:
            self._options = replace(self._options, **{name: int(given) if given else None})
        except ValueError as error:
            raise CommandError(
                str(error) if given.lstrip("-").isdigit() else f"/{name} takes a number"
            ) from None
        return (
            f"{name} {given}"
            if given
            else f"{name}: {'drawn anew' if name == 'seed' else 'as the file says'}"
        )

    def save(self, path: str) -> str:
        """Write the messages to a file, whole or not at all."""
        if not path:
            raise CommandError("give a file: /save FILE")
        target = Path(path).expanduser()
        part = target.with_name(target.name + ".part")
        try:
            part.write_text(
                json.dumps({"messages": self._messages}, ensure_ascii=False, indent=1) + "\n", "utf-8"
            )
            part.replace(target)
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror or error}") from None
        return f"{len(self._messages)} messages saved in {path}"

    def load(self, path: str) -> str:
        """Go on with the messages of a file that ``save`` wrote."""
        if not path:
            raise CommandError("give a file: /load FILE")
        try:
            read: Any = json.loads(Path(path).expanduser().read_text("utf-8"))
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror or error}") from None
        except ValueError:
            raise CommandError(f"{path} is no saved chat") from None
        messages = read.get("messages") if isinstance(read, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise CommandError(f"{path} is no saved chat")
        self._messages = messages
        return f"{len(messages)} messages loaded from {path}"

    def _role_of_last(self) -> str | None:
        return self._messages[-1]["role"] if self._messages else None

    def _answer(self) -> bool:
        """Print the answer to the messages; whether there is any. Ctrl-C stops it, and what was printed by
        then stays.
        """
        from pydiffusion.errors import PyDiffusionError

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
            common.say(figures(self._session._completion(len(prompt), finished)))
        except KeyboardInterrupt:
            common.say("stopped")
        except PyDiffusionError as error:
            common.say(f"{error}; /reset begins anew")
        if printer.text:
            self._messages.append({"role": "assistant", "content": printer.text})
        return bool(printer.text)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )
