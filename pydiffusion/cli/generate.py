"""``pydiffusion generate``: generate text from one prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _open, _options, _prompt
from ._run import prefill, run

if TYPE_CHECKING:
    from pydiffusion import Completion, DiffusionModel


@_options.takes(choices=_options.TEXT, runtime=_options.CHAT_RUNTIME)
def command(
    model: _options.ModelPath,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            help="Prompt; - reads standard input, the default in a pipe.",
            show_default=False,
        ),
    ] = None,
    *,
    choices: dict[str, Any],
    json_schema: _options.JsonSchema = None,
    regex: _options.Regex = None,
    grammar: _options.Grammar = None,
    grammar_file: _options.GrammarFile = None,
    runtime: dict[str, Any],
    chat: _prompt.Chat = None,
    system: _prompt.System = None,
    special: _prompt.Special = False,
    show: Annotated[
        bool, typer.Option("--show", help="Draw the canvas while it is denoised, on a terminal.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate text from a prompt, printed canvas by canvas."""
    if grammar is not None and grammar_file is not None:
        raise typer.BadParameter("give --grammar or --grammar-file, not both")
    choices |= {
        "json_schema": None if json_schema is None else _open.read_text_or_stdin(json_schema),
        "regex": regex,
        "grammar": grammar if grammar_file is None else _open.read_text_or_stdin(grammar_file),
    }
    _prompt.check(chat, system, special, runtime["chat_template"])
    _open.make_options(**choices)  # report invalid options before loading the model
    text = _read_prompt(prompt)
    opened = _open.open_model(model, runtime)
    ids = _prompt_ids(opened, text, chat, system, special)
    session = opened.new_session()
    prefill(session, ids)
    done = run(opened, session, _open.make_options(opened, **choices), show=show, quiet=as_json)
    if as_json:
        print(json.dumps(_as_dict(done), ensure_ascii=False))


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt: -p TEXT, or -p - and the text on standard input")
    if prompt is None or prompt == "-":
        return _open.read_text_or_stdin(Path("-"))
    return prompt


def _prompt_ids(
    model: DiffusionModel, text: str, chat: bool | None, system: str | None, special: bool
) -> list[int]:
    if not _prompt.uses_chat(model, chat, system, special):
        return model.tokenize(text, parse_special=special)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return model.chat_prompt(messages)


def _as_dict(done: Completion) -> dict[str, Any]:
    return {
        "text": done.text,
        "tokens": done.tokens.tolist(),
        "finish_reason": done.finish_reason,
        "n_prompt": done.n_prompt,
        "steps": done.steps,
        "canvas_steps": list(done.canvas_steps),
        "seed": done.seed,
        "timings": done.timings,
    }
