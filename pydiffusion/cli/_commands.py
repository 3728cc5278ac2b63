"""The commands' class: translates flags of other programs, expands ``~``, and suggests what was meant."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from ._foreign import VERBS, translate
from ._text import say


class Command(TyperCommand):
    """A command that knows the flags of llama.cpp and Ollama."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments after translating them; see ``_foreign.translate``."""
        own = {
            name: not (getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))
            for parameter in self.get_params(ctx)
            if parameter.param_type_name == "option"
            for name in [*parameter.opts, *parameter.secondary_opts]
        }
        translated = translate(_full_name(ctx), args, own)
        if translated.refused:
            ctx.fail("\n       ".join(translated.refused))
        rest = super().parse_args(ctx, translated.args)
        for note in translated.notes:
            say(f"pydiffusion: note: {note}")
        return rest


def _full_name(ctx: Any) -> str:
    """A command's name after the program's: ``inspect``, ``lora inspect``."""
    names = []
    while ctx.parent is not None:
        names.append(ctx.info_name or "")
        ctx = ctx.parent
    return " ".join(reversed(names))


class Group(TyperGroup):
    """The program: its commands, and the verbs of other programs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the command; says so if they belong after one."""
        if args and args[0] in ("help", "version"):
            args = ["--version"] if args[0] == "version" else [*args[1:], "--help"]
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0].startswith("-") and args[0] not in own:
            near = difflib.get_close_matches(args[0], own, 1)
            if args[0] in ("-v", "-V", "-version"):
                ctx.fail("pydiffusion --version prints the version")
            more = f" Did you mean {near[0]}?" if near else ""
            ctx.fail(
                f"{args[0]} is no option before a command.{more} A command comes first:"
                " pydiffusion generate -m MODEL -p TEXT, pydiffusion chat -m MODEL, ..."
            )
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command of a verb, ours or another program's."""
        verb = args[0].removesuffix(".exe")
        meaning = VERBS.get(verb, "")
        if verb not in self.commands and meaning in self.commands:
            return super().resolve_command(ctx, [meaning, *args[1:]])
        if verb not in self.commands:
            ctx.fail(f"No such command {args[0]!r}: {meaning or self._guess(args[0])}")
        return super().resolve_command(ctx, args)

    def _guess(self, verb: str) -> str:
        if verb.endswith(".gguf") or "/" in verb or Path(verb).exists():
            return f"with a model, pydiffusion run {verb} chats, pydiffusion run {verb} TEXT answers"
        near = difflib.get_close_matches(verb.lower(), [*self.commands, *VERBS], 1, 0.75)
        if near:
            meaning = VERBS.get(near[0], near[0])
            return f"did you mean {meaning}?" if meaning in self.commands else meaning
        return f"commands are {', '.join(self.commands)}"


def with_home(command: Callable[..., None]) -> Callable[..., None]:
    """The command with ``~`` expanded in its paths, which shells leave alone in quotes and after ``=``."""

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        command(**{name: _expanded(value) for name, value in given.items()})

    return wrapped


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(entry) for entry in value]
    if not isinstance(value, Path) or not str(value).startswith("~") or value.exists():
        return value
    try:
        return value.expanduser()
    except RuntimeError:  # no such user
        return value
