"""``pydiffusion infill``: fill the holes of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _open, _options
from ._input import read_text_or_stdin
from ._run import display_for, figures
from ._text import say


@_options.takes(choices=_options.SAMPLER, runtime=_options.CHAT_RUNTIME)
def command(
    model: _options.ModelPath,
    choices: dict[str, Any],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Path of the text, with holes <|hole|> or <|hole:N|>; - reads standard input.",
            show_default=False,
        ),
    ],
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", help="User message that the text answers."),
    ] = None,
    hole_tokens: Annotated[
        int, typer.Option("--hole-tokens", help="Maximum number of tokens of a hole without N.")
    ] = 16,
    *,
    temperature: _options.Temperature = None,
    runtime: dict[str, Any],
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Draw the canvas while it is denoised, on a terminal, not only its steps."
        ),
    ] = False,
    quiet: _options.Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fill the holes of a text, and keep everything around them."""
    from ._display import AnswerPrinter

    if instruction is None and runtime["chat_template"] is not None:
        raise typer.BadParameter("--chat-template needs --instruction")
    choices["temperature"] = temperature
    _open.make_options(**choices)
    text = read_text_or_stdin(file)
    opened = _open.open_model(model, runtime, quiet=quiet)
    display = None if quiet else display_for(opened, (), show)
    with AnswerPrinter(display, quiet=True) as printer:
        filled = opened.infill(
            text,
            _open.make_options(metadata=opened.metadata, **choices),
            instruction=instruction,
            hole_tokens=hole_tokens,
            on_event=printer,
        )
    done = filled.completion
    if not quiet:
        say(figures(done))
    if as_json:
        fields = {"text": filled.text, "holes": list(filled.holes), "seed": done.seed, "steps": done.steps}
        print(json.dumps(fields | {"timings": done.timings}, ensure_ascii=False))
    else:
        print(filled.text, end="" if filled.text.endswith("\n") else "\n")
