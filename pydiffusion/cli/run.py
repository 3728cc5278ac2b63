"""``pydiffusion run``: chat, or answer a prompt, as Ollama's verb does."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _open, _options
from ._input import read_text_or_stdin
from .chat import chat
from .generate import Asked, Prompt, PromptFile, generate, read_prompt


@_options.takes(choices=_options.TEXT, constraint=_options.CONSTRAINT, runtime=_options.IMAGE_RUNTIME)
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
    image: _options.Images = None,
    *,
    choices: dict[str, Any],
    temperature: _options.Temperature = None,
    constraint: dict[str, Any],
    runtime: dict[str, Any],
) -> None:
    """Answer a prompt, as generate does; without one, chat. Text piped in beside a prompt goes before it."""
    choices["temperature"] = temperature
    path, left = _open.model_and_rest(model, words or [], first=model is None)
    if left or prompt or file is not None or not sys.stdin.isatty():
        choices |= _open.constraint_of(constraint)
        text = read_prompt(left, prompt, file, empty_is_wrong=True)
        if left or prompt or file is not None:
            text = f"{_piped()}{text}"
        asked = Asked(system=system, quiet=quiet, images=tuple(image or ()))
        generate(path, text, choices, runtime, asked)
    elif given := [name for name, value in constraint.items() if value is not None]:
        raise typer.BadParameter(f"--{given[0].replace('_', '-')} needs a prompt: run MODEL PROMPT")
    else:
        chat(path, system, choices, runtime, images=image)


def _piped() -> str:
    """Text that is piped in beside a prompt, with a line break behind it: what the prompt is about."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    text = read_text_or_stdin(Path("-")).rstrip("\n")
    return f"{text}\n" if text else ""
