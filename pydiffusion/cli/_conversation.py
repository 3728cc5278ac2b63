"""State of a chat: messages, session, and the slash commands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._run import figures, prefill
from ._text import printable, say

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel, GenerationOptions

Message = dict[str, str]


class CommandError(Exception):
    """A slash command that can't be executed; the chat continues."""


class Conversation:
    """Messages of a chat and the session that caches them."""

    def __init__(self, model: DiffusionModel, options: GenerationOptions, system: str | None) -> None:
        self._model = model
        self._options = options
        self._system = system
        self._session = model.new_session()
        self.reset()

    def reset(self) -> None:
        """Clear the messages; the cache is replaced by the next prompt."""
        self._messages: list[Message] = (
            [] if self._system is None else [{"role": "system", "content": self._system}]
        )

    def say(self, text: str) -> None:
        """Add a user message and print the answer."""
        self._messages.append({"role": "user", "content": text})
        if not self._answer():
            self._messages.pop()

    def retry(self) -> None:
        """Regenerate the last answer; the previous one is restored if the new one is empty."""
        before = self._messages.pop() if self._role_of_last() == "assistant" else None
        if self._role_of_last() != "user":
            raise CommandError("there is no message to answer again")
        if not self._answer() and before is not None:
            self._messages.append(before)

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

    def set_option(self, name: str, given: str) -> str:
        """Set ``steps`` or ``seed`` to a number, or reset it without one; returns a message."""
        from pydiffusion import OptionError

        try:
            choice: dict[str, Any] = {name: int(given) if given else None}
        except ValueError:
            raise CommandError(f"/{name} takes a number") from None
        try:
            self._options = replace(self._options, **choice)
        except OptionError as error:
            raise CommandError(str(error)) from None
        return (
            f"{name} {given}"
            if given
            else f"{name}: {'drawn anew' if name == 'seed' else 'as the file says'}"
        )

    def save(self, path: str) -> str:
        """Write the messages to a file atomically."""
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
        """Load the messages of a file written by ``save``."""
        if not path:
            raise CommandError("give a file: /load FILE")
        try:
            read: Any = json.loads(Path(path).expanduser().read_text("utf-8"))
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror or error}") from None
        except ValueError:
            raise CommandError(f"{path} is not a saved chat") from None
        messages = read.get("messages") if isinstance(read, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise CommandError(f"{path} is not a saved chat")
        self._messages = messages
        return f"{len(messages)} messages loaded from {path}"

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


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )
