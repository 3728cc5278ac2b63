"""``pydiffusion infill``: a text with holes in, the text with its holes filled out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _common as common
from .generate import figures, read_text


@common.takes(choices=common.SAMPLER, place=common.PLACE)
def command(
    model: common.ModelPath,
    choices: dict[str, Any],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A text with holes, <|hole|> or <|hole:N|> for N tokens at most; - reads standard input.",
            show_default=False,
        ),
    ],
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", help="A user's message to which the text is the answer."),
    ] = None,
    hole_tokens: Annotated[
        int, typer.Option("--hole-tokens", help="Tokens of a hole that doesn't say how many.")
    ] = 16,
    *,
    place: dict[str, Any],
    show: Annotated[
        bool, typer.Option("--show", help="Draw the canvas as it settles (on a terminal).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, holes and figures as JSON.")] = False,
) -> None:
    """Fill the holes of a text, with all around them held."""
    from ._display import AnswerPrinter, CanvasDisplay

    options = common.make_options(**choices)
    text = read_text(file)
    opened = common.open_model(model, place)
    display = CanvasDisplay(opened.tokenizer, ()) if show and sys.stderr.isatty() else None
    with AnswerPrinter(display, quiet=True) as printer:
        filled = opened.infill(
            text, options, instruction=instruction, hole_tokens=hole_tokens, on_event=printer
        )
    done = filled.completion
    common.say(figures(done))
    if as_json:
        fields = {"text": filled.text, "holes": list(filled.holes), "seed": done.seed, "steps": done.steps}
        print(json.dumps(fields | {"timings": done.timings}, ensure_ascii=False))
    else:
        print(filled.text, end="" if filled.text.endswith("\n") else "\n")
