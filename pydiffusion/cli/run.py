"""``pydiffusion run``: chat, or answer a prompt, as Ollama's verb does."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from . import _open, _options
from .chat import chat
from .generate import Asked, Prompt, PromptFile, generate, read_prompt


@_options.takes(choices=_options.TEXT, constraint=_options.CONSTRAINT, runtime=_options.CHAT_RUNTIME)
def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL PROMPT...",
            help="The model, unless -m names it, and a prompt.",
            show_default=False,
        ),
    ] = None,
    model: _options.ModelOrFirst = None,
    prompt: Prompt = None,
    file: PromptFile = None,
    system: _options.System = None,
    quiet: _options.Quiet = False,
    *,
    choices: dict[str, Any],
    temperature: _options.Temperature = None,
    constraint: dict[str, Any],
    runtime: dict[str, Any],
) -> None:
    """Answer a prompt, as generate does; without one, chat."""
    choices["temperature"] = temperature
    path, left = _open.model_and_rest(model, words or [], first=model is None)
    if left or prompt or file is not None or not sys.stdin.isatty():
        choices |= _open.constraint_of(constraint)
        text = read_prompt(left, prompt, file, empty_is_wrong=True)
        generate(path, text, choices, runtime, Asked(system=system, quiet=quiet))
    elif given := [name for name, value in constraint.items() if value is not None]:
        raise typer.BadParameter(f"--{given[0].replace('_', '-')} needs a prompt: run MODEL PROMPT")
    else:
        chat(path, system, choices, runtime)
