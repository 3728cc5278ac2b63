"""``pydiffusion generate``: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _common as common

if TYPE_CHECKING:
    from pydiffusion import Completion, DiffusionModel, GenerationOptions, Session


@common.takes(choices=common.TEXT, place=common.PLACE)
def command(
    model: common.ModelPath,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p", "--prompt", help="The prompt; - reads it from standard input.", show_default=False
        ),
    ] = None,
    *,
    choices: dict[str, Any],
    json_schema: common.JsonSchema = None,
    regex: common.Regex = None,
    place: dict[str, Any],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="The prompt as a user's message through the file's chat template, or as it stands."
            " [default: --chat where the file has a template]",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message in front, with --chat.")
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Read control tokens spelled out in a raw prompt as such.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Draw the canvas as it settles (on a terminal).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Generate text from a prompt; the text goes to stdout canvas by canvas."""
    choices |= {"json_schema": None if json_schema is None else read_text(json_schema), "regex": regex}
    common.make_options(**choices)  # what is out of range should not wait for the model to load
    text = _read_prompt(prompt)
    opened = common.open_model(model, place)
    ids = _prompt_ids(opened, text, chat, system, special)
    session = opened.new_session()
    prefill(session, ids)
    done = run(opened, session, common.make_options(opened, **choices), show=show, quiet=as_json)
    if as_json:
        print(json.dumps(_as_dict(done), ensure_ascii=False))


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt: -p TEXT, or -p - and the text on standard input")
    if prompt is None or prompt == "-":
        return read_text(Path("-"))
    return prompt


def read_text(file: Path) -> str:
    """A file, or standard input for ``-``. Raises ValueError for what is no UTF-8."""
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if str(file) == "-" else str(file)
        raise ValueError(f"{name} is no valid UTF-8 at byte {error.start}") from None


def _prompt_ids(
    model: DiffusionModel, text: str, chat: bool | None, system: str | None, special: bool
) -> list[int]:
    if chat is None:
        chat = model.has_chat_template
    if not chat:
        if system is not None:
            raise typer.BadParameter("--system needs --chat")
        return model.tokenize(text, parse_special=special)
    if special:
        raise typer.BadParameter("--special needs --raw")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return model.chat_prompt(messages)


def prefill(session: Session, ids: list[int]) -> None:
    """Bring the prompt into the session's cache, with progress shown."""
    from ._display import progress

    if not ids:
        raise ValueError("the prompt has no tokens")
    with progress(f"reading {len(ids)} tokens") as update:
        session.prefill(ids, progress=update)


def run(
    model: DiffusionModel,
    session: Session,
    options: GenerationOptions,
    *,
    show: bool,
    quiet: bool = False,
    seconds_per_step: float = 0.0,
) -> Completion:
    """Generate behind what the session has: text to stdout (unless quiet), figures to stderr.

    show: draw the drafts, where stderr is a terminal.
    """
    from ._display import AnswerPrinter, CanvasDisplay

    options = model.resolve(options)
    draw = show and sys.stderr.isatty()
    display = CanvasDisplay(model.tokenizer, options.eos, seconds_per_step) if draw else None
    with AnswerPrinter(display, quiet) as printer:
        done = session.complete(options, on_event=printer)
    common.say(figures(done))
    return done


def figures(done: Completion) -> str:
    """Speed and length on one line; ms per step and steps per canvas are what others can be compared by."""
    n_canvases = len(done.canvas_steps)
    seconds = done.timings["encode"] + done.timings["denoise"]
    return (
        f"{done.n_prompt} + {len(done.tokens)} tokens ({done.finish_reason}), {n_canvases} canvas"
        f"{'es' if n_canvases != 1 else ''}, {done.steps / n_canvases:.1f} steps per canvas,"
        f" {1000 * done.timings['denoise'] / done.steps:.1f} ms per step,"
        f" {len(done.tokens) / seconds if seconds else 0:.1f} tokens/s, seed {done.seed}"
    )


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
