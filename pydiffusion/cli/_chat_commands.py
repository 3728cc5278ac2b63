"""Slash commands of a chat: ours, and those of Ollama and llama.cpp that mean the same."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable

from ._conversation import CommandError, Conversation
from ._text import say

HELP = """/system TEXT  the system message from now on; without TEXT it is shown
/set NAME N   an option of the answers (steps, seed, max_tokens, t_max, ...); without N the file's
/steps N      as /set steps N; /seed N likewise
/image FILE   an image that the next message is about; may be repeated; without FILE they are forgotten
/lora PATH:N  adapters from now on, several apart by blanks; none for none; without PATH they are listed
/retry        answer the last message again
/edit TEXT    replace the last answer; the model fills a <|hole|> in it
/save FILE    save the conversation; /load FILE loads it, /load lists those saved by themselves
/clear        start a new conversation
/bye          end, like Ctrl-D; Ctrl-C stops an answer
Pasted lines are one message, and so are lines between two of \"\"\"; one that ends in \\ goes on."""

ENDS = ("/exit", "/quit", "/bye")
# Ollama's names of options.
_PARAMETERS = {"num_predict": "max_tokens", "num_steps": "steps"}
_AT_START = {"num_ctx": "--ctx", "num_gpu": "--gpu-layers", "num_thread": "--threads"}


def obey(conversation: Conversation, command: str) -> None:
    """Execute a slash command. Raises CommandError if it can't be."""
    name, _, rest = command.partition(" ")
    if name in _COMMANDS:
        _COMMANDS[name](conversation, rest.strip())
        return
    if name in _HINTS:
        raise CommandError(f"{name}: {_HINTS[name]}")
    near = difflib.get_close_matches(name, [*_COMMANDS, *ENDS], 1)
    meant = f", did you mean {near[0]}?" if near else "; /help lists them."
    raise CommandError(f'{name} is not a command{meant} A message that begins with / goes between """')


def _reset(conversation: Conversation, _: str) -> None:
    conversation.reset()
    say("forgotten")


def _help(_: Conversation, __: str) -> None:
    print(HELP, file=sys.stderr, flush=True)


def _set(conversation: Conversation, text: str) -> None:
    """``/set NAME VALUE``, and Ollama's ``/set parameter NAME VALUE`` and ``/set system TEXT``."""
    name, _, value = text.removeprefix("parameter ").strip().partition(" ")
    name, value = _PARAMETERS.get(name, name), value.strip()
    if name == "system":
        say(conversation.set_system(_unquoted(value)))
    elif name in _AT_START:
        raise CommandError(
            f"{name} is chosen at the start: pydiffusion chat {_AT_START[name]} {value or 'N'}"
        )
    elif name in _SET_HINTS:
        raise CommandError(f"{name}: {_SET_HINTS[name]}")
    else:
        say(conversation.set_option(name, value))


def _unquoted(text: str) -> str:
    return text[1:-1].strip('"') if len(text) > 1 and text[0] == text[-1] == '"' else text


def _option(name: str) -> Callable[[Conversation, str], None]:
    return lambda conversation, value: say(conversation.set_option(name, value))


_COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/help": _help,
    "/?": _help,
    "/clear": _reset,
    "/reset": _reset,
    "/new": _reset,
    "/system": lambda conversation, text: say(conversation.set_system(_unquoted(text))),
    "/set": _set,
    "/steps": _option("steps"),
    "/seed": _option("seed"),
    "/image": lambda conversation, file: say(conversation.attach_file(file)),
    "/lora": lambda conversation, text: say(conversation.set_lora(text)),
    "/retry": lambda conversation, _: conversation.retry(),
    "/regen": lambda conversation, _: conversation.retry(),
    "/edit": lambda conversation, text: conversation.edit(text),
    "/save": lambda conversation, file: say(conversation.save(file)),
    "/load": lambda conversation, file: say(conversation.load(file)),
}
_PENALTY = "a diffusion sampler has none; /set steps, t_min, t_max, entropy_bound"
_SET_HINTS = {
    **dict.fromkeys(("top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "typical_p"), _PENALTY),
    "verbose": "speed and steps are always printed",
    "quiet": "pydiffusion generate --quiet prints answers only",
    "history": "input is always kept; pydiffusion chat --no-save saves no conversations",
    "nohistory": "pydiffusion chat --no-save saves no conversations",
    "format": "for answers as JSON: pydiffusion generate --json-schema FILE",
    "wordwrap": "the terminal wraps lines",
    "nowordwrap": "the terminal wraps lines",
    "think": "thinking is the chat template's choice; /set thinking_budget N limits it",
    "nothink": "thinking is the chat template's choice; /set thinking_budget N limits it",
    "num_keep": "nothing is dropped from a full context; /clear starts a new one",
}
_HINTS = {
    "/show": "pydiffusion inspect MODEL shows a file; /system shows the system message",
    "/read": "paste the text, or pydiffusion generate -f FILE",
    "/audio": "audio is not read",
    "/glob": "paste the text, or pydiffusion generate -f FILE",
    "/model": "a chat has one model; end it and name another with -m",
}
